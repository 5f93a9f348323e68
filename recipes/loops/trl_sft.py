"""TRL's supervised fine-tuning; each layer keeps its input alone and streams (streambp). From the repository's root:

python recipes/loops/trl_sft.py
"""

from pathlib import Path

from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import strategies
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "chats.jsonl"


class StreamedTrainer(strategies.TrainerMixin, SFTTrainer):
    """SFTTrainer, but for who runs the layers."""


def main(steps: int = 20, output_dir: str = "runs/loops/trl_sft") -> SFTTrainer:
    trainer = StreamedTrainer(
        strategies=[strategies.get("streambp")(chunk=16)],
        model=LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256)),
        args=SFTConfig(
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
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
