"""Hugging Face's Trainer; the whole model runs by the chunk (seco). From the repository's root:

python recipes/loops/hf_trainer.py
"""

import json
from pathlib import Path

from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import strategies
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "chats.jsonl"


class ChunkedTrainer(strategies.TrainerMixin, Trainer):
    """Trainer, but for who runs the model."""


def main(steps: int = 20, output_dir: str = "runs/loops/hf_trainer") -> Trainer:
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256))
    chats = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
    rows = [tokenizer.apply_chat_template(chat, return_dict=True) for chat in chats]
    trainer = ChunkedTrainer(
        strategies=[strategies.get("seco")(chunk=16)],
        model=model,
        args=TrainingArguments(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
