"""What a model will learn from: tokens of the first samples, with their loss mask."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

from launch.data.data import Data
from launch.data.rows import Row, Sequence
from launch.recipe import Recipe

EXAMINED_ROWS = 64
SHOWN_TOKENS = 600
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show(recipe: Recipe, tokenizer: Any, data: Data, count: int, as_json: bool) -> dict[str, Any]:
    """The first `count` rows of the stream and a summary of at least the first 64; printed unless `as_json`.

    It warns when no token that ends a turn or a text is learned in them: a model trained so does not stop.
    """
    wanted = max(count, EXAMINED_ROWS)
    examined = data.fetch(0, wanted if data.rows is None else min(wanted, data.rows))
    sequences = [sequence for _, row in examined for sequence in row]
    learned = sum(int(sequence.learned.sum()) for sequence in sequences)
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    result = {
        "sources": data.summaries,
        "objective": recipe.objective.name,
        "packing": recipe.packing,
        "max_length": recipe.max_length,
        "rows": data.rows,
        "examined_rows": len(examined),
        "examined_tokens": tokens,
        "learned_share": learned / tokens,
        "samples": [_sample(row_id, row, tokenizer) for row_id, row in examined[:count]],
        "warnings": _stop_warnings(tokenizer, sequences, recipe.max_length),
    }
    if not as_json:
        for row_id, row in examined[:count]:
            _print_row(row_id, row, tokenizer, rewarded=recipe.objective.name == "grpo")
        _print_summary(result)
    return result


def _sample(row_id: int, row: Row, tokenizer: Any) -> dict[str, Any]:
    return {
        "id": row_id,
        "sequences": [
            {
                "tokens": sequence.tokens.tolist(),
                "learned": sequence.learned.tolist(),
                "text": [[mark, text] for mark, text in _runs(sequence, tokenizer)],
                "reward": sequence.reward,
            }
            for sequence in row
        ],
    }


def _runs(sequence: Sequence, tokenizer: Any) -> list[tuple[bool, str]]:
    """(learned, text) of the stretches that share their mask."""
    pairs = zip(sequence.learned.tolist(), sequence.tokens.tolist(), strict=True)
    return [
        (mark, tokenizer.decode([token for _, token in run], clean_up_tokenization_spaces=False))
        for mark, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def stop_tokens(tokenizer: Any) -> set[int]:
    """The end token, and the special tokens with which the chat template ends the assistant's turn."""
    stops = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b7b"}]
        try:
            end = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("b7b")[2]
        except Exception:  # a template may refuse any conversation; then it tells nothing about stopping
            return stops
        special = set(tokenizer.added_tokens_decoder)
        stops |= special & set(tokenizer(end, add_special_tokens=False)["input_ids"])
    return stops


def _stop_warnings(tokenizer: Any, sequences: list[Sequence], max_length: int) -> list[str]:
    """Where every sequence is cut at max_length, none shows how it ends, and nothing is said."""
    stops = stop_tokens(tokenizer)
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops))) or "none, the tokenizer names no end token"
    there = {int(token) for sequence in sequences for token in sequence.tokens}
    learned = {int(token) for sequence in sequences for token in sequence.tokens[sequence.learned]}
    if stops & learned or all(len(sequence.tokens) == max_length for sequence in sequences):
        return []
    where = "occurs in these rows but is never learned" if stops & there else "does not occur in these rows"
    return [f"no stop token is learned: {names} {where}, so the trained model may not stop"]


def _print_row(row_id: int, row: Row, tokenizer: Any, rewarded: bool) -> None:
    for index, sequence in enumerate(row):
        part = f", sequence {index + 1} of {len(row)}" if len(row) > 1 else ""
        reward = f", reward {sequence.reward:g}" if rewarded else ""
        print(f"--- row {row_id}{part}: {len(sequence.tokens)} tokens, {sequence.learned.sum()} learned{reward}")
        print(_marked(sequence, tokenizer))


def _marked(sequence: Sequence, tokenizer: Any) -> str:
    """The text with its learned stretches in green on a terminal, in brackets elsewhere."""
    opening, closing = (GREEN, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    shown = Sequence(sequence.tokens[:SHOWN_TOKENS], sequence.learned[:SHOWN_TOKENS])
    runs = [(mark, _printable(text)) for mark, text in _runs(shown, tokenizer)]
    text = "".join(f"{opening}{text}{closing}" if mark else text for mark, text in runs)
    hidden = len(sequence.tokens) - SHOWN_TOKENS
    return f"{text}\n(and {hidden} more tokens)" if hidden > 0 else text


def _printable(text: str) -> str:
    """Without control characters, which a data set could use to move the cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _print_summary(result: dict[str, Any]) -> None:
    for source in result["sources"]:
        known = ", ".join(f"{source[key]:,} {key}" for key in ("rows", "tokens", "dropped") if key in source)
        print(f"source {source['name']}: weight {source['weight']:g}{', ' if known else ''}{known}")
    rows = "unknown (streaming)" if result["rows"] is None else f"{result['rows']:,}"
    share = f"{result['learned_share']:.1%} of the first {result['examined_rows']} rows"
    print(f"rows of one epoch: {rows}; learned: {share}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
