"""A loop of one's own, with a loss of its own: the model runs by the chunk (seco). From the repository's root:

python recipes/loops/bare_loop.py
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import strategies
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "preferences.jsonl"


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256)).train()
    strategies.attach(model, [strategies.get("seco")(chunk=8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    losses = []
    for step in range(steps):
        pairs = [rows[(4 * step + index) % len(rows)] for index in range(4)]
        texts = [pair["prompt"] + pair[which] for which in ("chosen", "rejected") for pair in pairs]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        logprobs = model(**batch).logits[:, :-1].log_softmax(-1)
        of_tokens = logprobs.gather(2, batch["input_ids"][:, 1:, None])[:, :, 0] * batch["attention_mask"][:, 1:]
        chosen, rejected = of_tokens.sum(1).chunk(2)
        loss = torch.relu(1 - (chosen - rejected)).mean() - 0.1 * chosen.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
