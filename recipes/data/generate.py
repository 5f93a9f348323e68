"""Writes the recipes' small data sets beside this file: additions, as chats, preferences and groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLES = 48


def additions() -> list[tuple[str, int]]:
    return [(f"{a} + {b} = ", a + b) for a, b in ((7 * i % 50, 11 * i % 40) for i in range(SAMPLES))]


def chats() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question.strip()},
                {"role": "assistant", "content": str(answer)},
            ]
        }
        for question, answer in additions()
    ]


def preferences() -> list[dict[str, Any]]:
    return [
        {"prompt": question, "chosen": str(answer), "rejected": str(answer + 1 + index % 9)}
        for index, (question, answer) in enumerate(additions())
    ]


def groups() -> list[dict[str, Any]]:
    return [
        {
            "prompt": question,
            "completions": [str(answer), str(answer + 1), str(answer + 10), "no"],
            "rewards": [1.0, 0.5, 0.25, 0.0],
        }
        for question, answer in additions()
    ]


def files() -> dict[str, str]:
    """The text of every file, by name."""
    sets = {"chats.jsonl": chats(), "preferences.jsonl": preferences(), "groups.jsonl": groups()}
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in sets.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text)
