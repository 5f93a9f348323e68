"""Messages through the tokenizer's chat template, and which of their tokens the assistant said."""

from __future__ import annotations

import re
from typing import Any

from distrib.redaction import one_line

Message = dict[str, Any]


class Chat:
    """The assistant's tokens are learned, with the token that ends its turn.

    Where the template marks them with {% generation %}, its marks are used. Elsewhere the text up to each
    turn is rendered alone, with the generation prompt: what the whole conversation has beyond it, up to
    the turn's end, is what the assistant said. That needs a template that renders a conversation's
    beginning the same whatever follows it; one that does not (it drops the reasoning of earlier turns,
    say) is refused.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: Any, given: int = 0) -> tuple[list[int], list[bool]]:
        """Token ids and which are learned; the first `given` messages never are. A ValueError says what is
        wrong."""
        turns = _checked(messages)
        template = self._template()
        whole = self._render(turns)
        whole.encode()  # no halves of surrogate pairs
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        if re.search(r"\{%-?\s*generation\b", template):
            first = len(self._prefix(whole, turns[:given], False)) if given else 0
            # By characters: of one that takes several tokens, the mask may have the first alone.
            marked = {start for start, mark in zip(starts, self._marks(turns), strict=True) if mark}
            return ids, [start in marked and start >= first for start in starts]
        spans = [
            (len(self._prefix(whole, turns[:i], True)), len(self._prefix(whole, turns[: i + 1], False)))
            for i in range(given, len(turns))
            if turns[i]["role"] == "assistant"
        ]
        return ids, [any(begin <= start < end for begin, end in spans) for start in starts]

    def _template(self) -> str:
        if not self.tokenizer.is_fast:
            raise ValueError(f"messages need a fast tokenizer; {type(self.tokenizer).__name__} is not one")
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError("messages need a chat template and the tokenizer has none; use prompt and completion")
        return template if isinstance(template, str) else str(template.get("default", ""))

    def _render(self, turns: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(turns, **({"tokenize": False} | options))
        except Exception as error:  # the template is a program that came with the tokenizer
            raise ValueError(f"the chat template refuses the messages: {one_line(error, 200)}") from None

    def _marks(self, turns: list[Message]) -> list[int]:
        marked = self._render(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        masks: list[int] = marked["assistant_masks"]
        return masks

    def _prefix(self, whole: str, turns: list[Message], prompt: bool) -> str:
        text: str = self._render(turns, add_generation_prompt=prompt)
        if not whole.startswith(text):
            raise ValueError(
                f"the chat template renders the first {len(turns)} messages differently once others follow: "
                "the assistant's tokens cannot be told; use a template with {% generation %}, or one turn"
            )
        return text


def _checked(messages: Any) -> list[Message]:
    """Messages with a role and a text each, without the empty fields that column formats add."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one {role, content}")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} must have a role and a content")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"message {index}: content is {type(content).__name__}, must be a string")
        turns.append({name: value for name, value in message.items() if value is not None})
    return turns
