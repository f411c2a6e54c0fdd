"""Answers are found in a text, in time that is linear in its length.

This holds for any text, since texts are untrusted.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ogls.records import Verdict

_SHOWN = 200  # characters of an answer that a feedback quotes

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_LONGEST_JOINT = 80
_JOINT = re.compile(  # what may stand between two boxes that are one answer: no sentence, nothing that is derived
    r"""(?: [\s,;:.?&$*~_•·/-] | \\[()\[\],;!:\\\ ] | \\q?quad\b | \\(?:lor|vee|land|wedge)\b
    | \\(?:text|textbf|mathrm|mbox)\s*\{ | \}
    | \b(?:and|or|either|both|maybe|perhaps|possibly|also|alternatively|else|plus|then|finally|lastly)\b
    | \b(?:option|case|part|answer|solution|guess)\s*\(?\w{1,2}\b\)?
    | \(?\b\w{1,3}\)
    | \b\d{1,2}\.\s
    | \b[a-z](?:_\{?\w+\}?)?\s*&?=
    )*+""",
    re.IGNORECASE | re.VERBOSE,
)


class Box(NamedTuple):
    r"""A box begins at `command`; what it holds begins at `start` and ends at `end`."""

    command: int
    start: int
    end: int


def after_thinking(text: str) -> str:
    """Returns what follows the last ``</think>`` and precedes a further ``<think>``; a text without either as it is."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def ends_in_thought(text: str, opened: bool) -> bool:
    """Returns whether a text ends within a thought.

    Args:
        text: what was written after a prompt
        opened: whether the prompt ends with ``<think>``, as some chat templates have it
    """
    return "<think>" in text.rpartition("</think>")[2] or (opened and "</think>" not in text)


def without_thoughts(text: str, unclosed: bool = False) -> str:
    """Returns a text without its thoughts; one that has none as it is.

    A thought reaches from ``<think>`` to the next ``</think>``, from the beginning where the prompt had opened it, and
    to the end where it is not closed. The white space after it goes, too.

    Args:
        text: text with thoughts in it
        unclosed: whether the text ends within a thought, though it may lack the ``<think>``, which stood in the prompt
    """
    *closed, last = text.split("</think>")
    said = [before for before, begun, _ in (piece.partition("<think>") for piece in closed) if begun]
    before, begun, _ = last.partition("<think>")
    said += [before] if begun or not unclosed else []
    return "".join(map(str.lstrip, said) if closed else said)


def unparsable(why: str) -> Verdict:
    """Returns the verdict on a text in which no answer can be read; `why` is its feedback."""
    return Verdict(correct=False, status="unparsable", feedback=why)


def judged(correct: bool, answer: str, read: str | None = None) -> Verdict:
    """Returns the verdict on an answer, with a feedback that quotes it.

    Args:
        correct: whether the answer is right
        answer: wording of the answer that votes are counted by
        read: the answer as it stands in the text; None for the same
    """
    shown = answer if read is None else read
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} [...]"
    feedback = f"The answer read is {shown}, which is {'right' if correct else 'wrong'}."
    return Verdict(correct=correct, status="graded", answer=answer, feedback=feedback)


def boxes(text: str) -> list[Box]:
    r"""Returns every complete ``\boxed{...}`` and ``\fbox{...}``, by where they start.

    ``\{`` and ``\}`` do not count as braces.
    """
    found: list[Box] = []
    open_braces: list[tuple[int, int] | None] = []  # of a box: where it begins and where its content does
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append((token.start(), token.end()))
        elif token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened is not None:
                found.append(Box(*opened, token.start()))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    r"""Returns what is inside the last complete ``\boxed{...}``; None when there is none."""
    found = boxes(text)
    return text[found[-1].start : found[-1].end] if found else None


def last_boxes(text: str) -> list[str]:
    r"""Returns what is inside the last boxes that are one answer together, in their order and each wording once.

    ``\boxed{1}, \boxed{2} and \boxed{3}`` are one answer, whether a list or a guess. With prose between two boxes, the
    later one is the answer.
    """
    found = boxes(text)
    if not found:
        return []
    group = [found[-1]]
    edge = found[-1].command  # where the group begins, with the boxes that it is nested in
    for box in reversed(found[:-1]):
        if box.end > edge:  # around the last one
            edge = box.command
        elif edge - box.end - 1 <= _LONGEST_JOINT and _JOINT.fullmatch(text, box.end + 1, edge):
            group.append(box)
            edge = box.command
        else:
            break
    return list(dict.fromkeys(text[box.start : box.end].strip() for box in reversed(group)))


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """Returns what is inside the last complete ``<answer>...</answer>``; None where there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def printable(text: str, max_length: int) -> str:
    """Returns the beginning of a text, without control characters and lone surrogates."""
    return _UNPRINTABLE.sub("", text[:max_length])


def acceptable(answer: str, max_length: int) -> bool:
    """Returns whether an answer has 1 to `max_length` characters, without control characters and lone surrogates."""
    return 0 < len(answer) <= max_length and not _UNPRINTABLE.search(answer)
