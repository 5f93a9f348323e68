"""TRL's policy optimisation with a reward of one's own; completions come as ever, the model learns by the chunk (seco).

From the repository's root:

python recipes/loops/trl_grpo.py
"""

from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import strategies
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "groups.jsonl"


class ChunkedTrainer(strategies.TrainerMixin, GRPOTrainer):
    """GRPOTrainer, but for who runs the model."""


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def main(steps: int = 20, output_dir: str = "runs/loops/trl_grpo") -> GRPOTrainer:
    trainer = ChunkedTrainer(
        strategies=[strategies.get("seco")(chunk=8)],
        model=LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256)),
        args=GRPOConfig(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            logging_steps=5,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(DATA), split="train").select_columns(["prompt"]),
        processing_class=byte_tokenizer(),
        reward_funcs=digits,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
