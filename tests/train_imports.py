"""What a run imports on its way, so that the server of forks has it already."""

import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import peft.tuners.lora
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.generation
import transformers.models.llama.modeling_llama

__all__ = ["deepspeed", "peft", "torch", "transformers"]
