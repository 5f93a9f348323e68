"""Writes the recipes' small data sets beside this file: additions, as chats, preferences and groups."""

from __future__ import annotations

import json
from pathlib import Path

from launch.data.additions import additions

COLUMNS = {
    "chats.jsonl": ("messages",),
    "preferences.jsonl": ("prompt", "chosen", "rejected"),
    "groups.jsonl": ("prompt", "completions", "rewards"),
}


def files() -> dict[str, str]:
    """The text of every file, by name."""
    rows = additions()
    return {
        name: "".join(json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)
        for name, columns in COLUMNS.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text)
