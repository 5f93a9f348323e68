"""A small built-in set of additions, whose records have the columns of every objective."""

from __future__ import annotations

from typing import Any

SAMPLES = 48


def additions() -> list[dict[str, Any]]:
    return [_record(index, 7 * index % 50, 11 * index % 40) for index in range(SAMPLES)]


def _record(index: int, first: int, second: int) -> dict[str, Any]:
    question, answer = f"{first} + {second} = ", first + second
    return {
        "messages": [
            {"role": "user", "content": question.strip()},
            {"role": "assistant", "content": str(answer)},
        ],
        "prompt": question,
        "chosen": str(answer),
        "rejected": str(answer + 1 + index % 9),
        "completions": [str(answer), str(answer + 1), str(answer + 10), "no"],
        "rewards": [1.0, 0.5, 0.25, 0.0],
    }
