"""Replicas that come and go (torchft), each with a strategy in its own loop. From the repository's root, once on every
machine; where no lighthouse is named this one starts its own, and says how others join:

python recipes/loops/replicas.py
"""

import json
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import strategies
from distrib.replicas import LIGHTHOUSE, Replicas
from launch.models import BUILT_IN
from launch.tokenizer import BYTE_VOCABULARY, byte_tokenizer

DATA = Path(__file__).parents[1] / "data" / "preferences.jsonl"
ROWS = 8


def main(steps: int = 20) -> list[float]:
    if LIGHTHOUSE not in os.environ:
        from torchft.coordination import LighthouseServer

        lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1)  # serves while it is referred to
        os.environ[LIGHTHOUSE] = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
        print(f"more of them on this machine: {LIGHTHOUSE}={os.environ[LIGHTHOUSE]} python recipes/loops/replicas.py")
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**BUILT_IN["tiny"], vocab_size=BYTE_VOCABULARY, eos_token_id=256)).train()
    strategies.attach(model, [strategies.get("seco")(chunk=8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [row["prompt"] + row["chosen"] for row in map(json.loads, DATA.read_text().splitlines())]
    losses = []
    with Replicas(model, optimizer) as replicas:
        for share in replicas.steps(steps):
            batch = [texts[(ROWS * share.step + index) % len(texts)] for index in range(ROWS)]
            all_tokens = sum(len(tokenizer(text)["input_ids"]) - 1 for text in batch)
            mine = tokenizer(batch[share.rank :: share.count], padding=True, return_tensors="pt")
            ids, learned = mine["input_ids"], mine["attention_mask"][:, 1:]
            logprobs = model(input_ids=ids, attention_mask=mine["attention_mask"]).logits[:, :-1].log_softmax(-1)
            loss = -(logprobs.gather(2, ids[:, 1:, None])[:, :, 0] * learned).sum() / all_tokens
            loss.backward()
            if (total := replicas.update(loss)) is not None:
                losses.append(total)
                print(f"step {share.step + 1}: loss {total:.3f}, replicas {share.count}", flush=True)
    return losses


if __name__ == "__main__":
    main()
