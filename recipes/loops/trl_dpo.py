"""TRL's preference optimisation with LoRA; the whole model runs by the chunk (seco), for the reference as well.

From the repository's root:

python recipes/loops/trl_dpo.py
"""

from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import strategies
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "preferences.jsonl"


class ChunkedTrainer(strategies.TrainerMixin, DPOTrainer):
    """DPOTrainer, but for who runs the model."""


def main(steps: int = 20, output_dir: str = "runs/loops/trl_dpo") -> DPOTrainer:
    trainer = ChunkedTrainer(
        strategies=[strategies.get("seco")(chunk=8)],
        model=LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256)),
        args=DPOConfig(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=5,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(DATA), split="train"),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
