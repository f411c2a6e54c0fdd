"""A chat is the conversation that a model's chat template makes of a system message and a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from ogls.policy.pretrained import (
        PreTrainedTokenizerBase,  # jsonargparse runs this block; transformers is slow to import
    )

TODAY = datetime(2026, 1, 1)
"""Templates that ask for the date get this one, so that a prompt is the same on every day of a run."""

_NO_SYSTEM = "leave data.prompts.system and the data's column `system` null"


class Chat:
    """A chat turns a system message and a text into the ids of a prompt, and checks the template that does so.

    Whatever the two say, they stay text: the name of a special token in them becomes no control token. The template is
    tried with stand-ins for both, before any problem is sent through it: it must show each of them exactly once, and
    the same at any time.

    Args:
        tokenizer: tokenizer of the model
        templated: whether the chat template is applied; otherwise the bare text is sent
        options: further arguments of the chat template, one set for each reader; all are tried

    Raises:
        ValueError: the chat template is asked for and missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, templated: bool, options: Sequence[dict[str, Any]]) -> None:
        if templated and tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template; set data.prompts.chat: false to send bare text")
        self.tokenizer, self.templated, self._options = tokenizer, templated, options
        self._special = tuple(tokenizer.all_special_tokens)
        self._system, self._text = f"\u241f{uuid4().hex}\u241f", f"\u241f{uuid4().hex}\u241f"
        self._tried: set[bool | None] = set()

    def encode(self, system: str | None, text: str, options: dict[str, Any]) -> tuple[int, ...]:
        """Returns the ids of a conversation in which the model has the next word.

        Args:
            system: system message; None leaves the template's own, if it has one
            text: the user's message
            options: further arguments of the chat template

        Raises:
            ValueError: the template drops or repeats one of the two, cannot take them, or differs from time to time.
        """
        named = any(token in part for part in (system or "", text) for token in self._special)
        if not self.templated:
            bare = f"{system}\n\n{text}" if system else text
            return tuple(self.tokenizer(bare, split_special_tokens=named)["input_ids"])
        self.check(system)
        if not named:
            pieces = [(self._render(system, text, options), False)]
        else:
            texts = {self._system: (system or "").strip(), self._text: text.strip()}
            shown = _within(system, self._system), _within(text, self._text) or self._text
            parts = re.split(f"({'|'.join(texts)})", self._render(*shown, options))
            pieces = [(texts.get(part, part), part in texts) for part in parts]
        encoded = [self.tokenizer(p, add_special_tokens=False, split_special_tokens=split) for p, split in pieces]
        return tuple(i for piece in encoded for i in piece["input_ids"])

    def check(self, system: str | None) -> None:
        """Tries the template, once for each kind of system message: none, empty, and some text.

        Raises:
            ValueError: see `encode`.
        """
        kind = None if system is None else bool(system)
        if self.templated and kind not in self._tried:
            for options in self._options:
                self._try(_within(system, self._system), options)
            self._tried.add(kind)

    def _try(self, system: str | None, options: dict[str, Any]) -> None:
        what = "the chat template" + (f" with the options {options}" if options else "")
        bare = "or set data.prompts.chat to false"
        cure = "mend it" if system is None else f"mend it, {_NO_SYSTEM}"
        try:
            rendered = [self._render(system, self._text, options) for _ in range(8)]
        except Exception as error:  # a template is a program of the model's makers
            said = str(error).strip().partition("\n")[0]
            reads = "a problem" if system is None else "a problem with a system message"
            raise ValueError(f"{what} cannot render {reads}, it says {said!r}: {cure}, {bare}") from error
        if len(set(rendered)) > 1:
            raise ValueError(f"{what} makes another prompt each time: mend it, {bare}")
        shown = {"text of the problem": self._text} | ({"system message": self._system} if system else {})
        for name, stand_in in shown.items():
            if (count := rendered[0].count(stand_in)) != 1:
                raise ValueError(f"{what} shows the {name} {count} times, expected once: {cure}, {bare}")

    def _render(self, system: str | None, text: str, options: dict[str, Any]) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        rendered: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, strftime_now=TODAY.strftime, **options
        )
        return rendered


def _within(text: str | None, stand_in: str) -> str | None:
    """Returns `text` with a stand-in for all but the white space around it, which some templates cut off."""
    if not text:
        return text
    core = text.strip()
    before, _, after = text.partition(core) if core else ("", "", text)
    return f"{before}{stand_in}{after}"
