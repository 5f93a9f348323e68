"""From records to rows: which tokens, and which of them are learned.

A *row* is what the global batch counts: one sample, one packed line, one pair, one group. It is a tuple of
sequences, so that one form serves them all:

    sft      (sequence,)                    packed: the documents of one line
    dpo      (chosen, rejected)
    grpo     one sequence a completion, each with its reward
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrib.errors import UserError
from launch.data.chat import Chat, Message
from launch.data.sources import LONGEST_CHARACTERS, Record

LARGEST = np.finfo(np.float64).max
SHAPES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "sft": [("messages", ("messages",)), ("answer", ("prompt", "completion")), ("text", ("text",))],
    "dpo": [("preference", ("chosen", "rejected"))],
    "grpo": [("group", ("prompt", "completions", "rewards"))],
}
"""For each objective the shapes of a record, first choice first, and the columns that each needs."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """A line of tokens [T]; `learned` says which of them count in the loss, never the first."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    reward: float = 0.0


Row = tuple[Sequence, ...]


@dataclass
class Tally:
    """What happened to the samples on the way: cut at max_length, or dropped since nothing of them is
    learned."""

    truncated: int = 0
    dropped: int = 0


@dataclass
class Encoder:
    """Turns the records of one data set into rows of at most `max_length` tokens a sequence.

    A text longer than that is split, since its parts are texts as well. Anything else is cut at its end:
    the parts of an answer are no answers. Begin-of-text comes once, where the tokenizer itself puts it;
    the end token is appended and learned. Messages are what the chat template makes of them, with nothing
    added.
    """

    dataset: str
    objective: str
    tokenizer: Any
    max_length: int
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.begin = [bos] if bos is not None and bos in self.tokenizer("")["input_ids"] else []
        self.end = [eos] if eos is not None else []
        self.chat = Chat(self.tokenizer)

    def learnable(self, records: Iterable[Record], first: int = 0) -> Iterator[Row]:
        """The rows of all records, without those of which nothing would be learned. `first` numbers them."""
        for number, record in enumerate(records, first):
            for row in self.rows(record, number):
                if all(sequence.learned.any() for sequence in row):
                    yield row
                else:
                    self.tally.dropped += 1

    def rows(self, record: Record, number: int) -> list[Row]:
        """The rows of one record, the `number`-th of its set: several from a long text, else exactly one."""
        shape = self.shape(record)
        if shape is None:
            columns = ", ".join(sorted(name for name, value in record.items() if value is not None))
            accepted = "; or ".join(" + ".join(needed) for _, needed in SHAPES[self.objective])
            raise UserError(
                f"dataset={self.dataset!r}, record {number} has the columns {columns or 'none'}: "
                f"objective {self.objective} takes {accepted}"
            )
        try:
            return self._text(record) if shape == "text" else [self._row(shape, record)]
        except ValueError as error:
            raise UserError(f"dataset={self.dataset!r}, record {number}: {error}") from None

    def _row(self, shape: str, record: Record) -> Row:
        if shape == "preference":
            return self._preference(record)
        if shape == "group":
            return self._group(record)
        if shape == "messages":
            return (self._cut(*self.chat.encode(record["messages"])),)
        return (self._answer(record["prompt"], record["completion"]),)

    def shape(self, record: Record) -> str | None:
        """How this record is read: the first shape of the objective whose columns it has."""
        for shape, needed in SHAPES[self.objective]:
            if all(record.get(name) is not None for name in needed):
                return shape
        return None

    def _ids(self, text: Any, what: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"{what} is {type(text).__name__}, must be a string")
        if len(text) > LONGEST_CHARACTERS:
            raise ValueError(f"{what} has {len(text)} characters, at most {LONGEST_CHARACTERS} are read; split it")
        text.encode()  # halves of surrogate pairs, which JSON can spell, are no text
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _begun(self, ids: list[int]) -> list[int]:
        """With begin-of-text, unless the text brings its own."""
        return ids if ids[:1] == self.begin else self.begin + ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self.end else ids + self.end

    def _cut(self, ids: list[int], learned: list[bool], reward: float = 0.0) -> Sequence:
        if len(ids) > self.max_length:
            self.tally.truncated += 1
            ids, learned = ids[: self.max_length], learned[: self.max_length]
        mask = np.array(learned, dtype=np.bool_)
        mask[:1] = False
        return Sequence(np.array(ids, dtype=np.int32), mask, reward)

    def _text(self, record: Record) -> list[Row]:
        ids = self._ids(record["text"], "text")
        ids = self._begun(ids) if record.get("begins", True) else ids
        ids = self._ended(ids) if record.get("ends", True) else ids
        cuts = [*range(0, len(ids), self.max_length), len(ids)]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
            cuts[-2] -= 1  # a part of one token would learn nothing
        parts = [ids[start:stop] for start, stop in pairwise(cuts)]
        return [(self._cut(part, [True] * len(part)),) for part in parts]

    def _answer(self, prompt: Any, completion: Any, reward: float = 0.0) -> Sequence:
        """A completion, learned, after its prompt, given: both strings, or messages for the chat template."""
        if isinstance(prompt, list) or isinstance(completion, list):
            given, answer = _messages(prompt, "user"), _messages(completion, "assistant")
            if given and answer[: len(given)] == given:
                answer = answer[len(given) :]
            return self._cut(*self.chat.encode(given + answer, given=len(given)), reward)
        head, whole = self._ids(prompt, "prompt"), self._ids(completion, "completion")
        joined = self._ids(prompt + completion, "prompt")
        # At inference the prompt stands alone: its tokens stay, even where they would merge with others.
        tail = joined[len(head) :] if joined[: len(head)] == head else whole
        head = self._begun(head)
        ids = self._ended(head + tail) if tail else head + self.end
        return self._cut(ids, [False] * len(head) + [True] * (len(ids) - len(head)), reward)

    def _preference(self, record: Record) -> Row:
        prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            return self._bare_pair(chosen, rejected)
        if prompt is None:
            prompt = _shared(_messages(chosen, "assistant"), _messages(rejected, "assistant"))
        return self._answer(prompt, chosen), self._answer(prompt, rejected)

    def _bare_pair(self, chosen: str, rejected: str) -> Row:
        """Without a prompt, the tokens that both texts begin with are given: they cancel in the objective
        anyway."""
        texts = [self._ended(self._begun(self._ids(text, "chosen or rejected"))) for text in (chosen, rejected)]
        given = len(_shared(*texts))
        first, second = (self._cut(ids, [index >= given for index in range(len(ids))]) for ids in texts)
        return first, second

    def _group(self, record: Record) -> Row:
        completions, rewards = record["completions"], record["rewards"]
        if not isinstance(completions, list) or not isinstance(rewards, list) or not completions:
            raise ValueError("completions and rewards must be lists with one entry a completion, at least one")
        if len(completions) != len(rewards):
            raise ValueError(f"{len(completions)} completions but {len(rewards)} rewards: must be as many")
        for reward in rewards:
            if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= LARGEST:
                raise ValueError(f"reward {reward!r} must be a finite number")
        return tuple(self._answer(record["prompt"], c, float(r)) for c, r in zip(completions, rewards, strict=True))


def _messages(value: Any, role: str) -> list[Message]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _shared(first: list[Any], second: list[Any]) -> list[Any]:
    """What two lists both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if length is None else length]
