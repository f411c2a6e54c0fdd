"""Packing lays prefixes and suffixes into one row of tokens without padding.

A model spends nearly all its time in linear layers, which do not care where a sequence begins. So all tokens of a pass
lie in one row, and only the attention (`ogls.policy.attention`) knows the sequences. There are two kinds:

- a *root* is read from its beginning: a prefix, or a prefix with its only suffix;
- a *branch* continues a root that several suffixes share: it attends to the root's keys and, causally, to its own.

Example: prefixes [a b c] and [d e], suffixes [u v w] and [x y] of the first, [z q] of the second. The row is
`a b c | d e z | u v | x`: two roots, two branches. The last token of a suffix is not run: nothing is predicted from it.
The state that predicts u and x is that of c, for z it is that of e. On a CPU the row ends in tokens that nobody reads,
which bring rows of nearly the same length to the same length (`ogls.system.sizes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogls.policy.layout import Grids, Varlen, layout
from ogls.system.sizes import rounded_up


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packing:
    """A packing is one pass of a model: a row of tokens, and its layout for the attention.

    Args:
        token_ids: ids of the row's tokens [tokens]
        position_ids: position of each token in its sequence [tokens]
        predicting: index in the row of the state that predicts each token of the suffixes [suffix tokens]
        longest: number of tokens of the longest sequence
        layout: where the sequences lie, for the attention
    """

    token_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    longest: int
    layout: Grids | Varlen


def pack(
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    owners: Sequence[int],
    *,
    share_prefixes: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Packing:
    """Returns the layout of every `suffixes[i]` after `prefixes[owners[i]]`.

    Args:
        prefixes: token ids of each prefix; those that no suffix continues are left out
        suffixes: token ids of each suffix
        owners: number of the prefix that each suffix continues
        share_prefixes: whether a prefix with several suffixes is run once; otherwise it is run once per suffix
        device: device of all tensors
        dtype: dtype of the attention's queries

    Raises:
        ValueError: a prefix or suffix is empty, or an owner does not exist.
    """
    _check(prefixes, suffixes, owners)
    num_owned = Counter(owners)
    roots: list[list[int]] = []
    root_of: dict[int, int] = {}  # prefix -> its root, where the prefix is shared
    place: list[tuple[int, int | None]] = []  # of each suffix: its root, and its branch unless it lies in the root
    branches: list[Sequence[int]] = []
    for suffix, owner in zip(suffixes, owners, strict=True):
        if share_prefixes and num_owned[owner] > 1:
            if owner not in root_of:
                root_of[owner] = len(roots)
                roots.append(list(prefixes[owner]))
            place.append((root_of[owner], len(branches) if len(suffix) > 1 else None))
            if len(suffix) > 1:
                branches.append(suffix[:-1])
        else:
            place.append((len(roots), None))
            roots.append([*prefixes[owner], *suffix[:-1]])

    root_starts = _starts(roots)
    branch_starts = [start + root_starts[-1] for start in _starts(branches)]
    predicting: list[int] = []
    branch_owners: list[int] = []
    for suffix, owner, (root, branch) in zip(suffixes, owners, place, strict=True):
        last = root_starts[root] + len(prefixes[owner]) - 1
        if branch is None:
            predicting += range(last, last + len(suffix))
        else:
            branch_owners.append(root)
            predicting += [last, *range(branch_starts[branch], branch_starts[branch + 1])]

    lengths, branch_lengths = [len(root) for root in roots], [len(branch) for branch in branches]
    tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    positions = [p for n in lengths for p in range(n)]
    for owner, length in zip(branch_owners, branch_lengths, strict=True):
        positions += range(lengths[owner], lengths[owner] + length)
    padding = [0] * (rounded_up(branch_starts[-1], device) - branch_starts[-1])
    return Packing(
        token_ids=tensor([t for sequence in (*roots, *branches, padding) for t in sequence]),
        position_ids=tensor(positions + padding),
        predicting=tensor(predicting),
        longest=max(positions) + 1,
        layout=layout(lengths, branch_lengths, branch_owners, device, dtype),
    )


def _starts(sequences: Sequence[Sequence[int]]) -> list[int]:
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence))
    return starts


def _check(prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], owners: Sequence[int]) -> None:
    if not suffixes or len(suffixes) != len(owners):
        raise ValueError(f"expected one owner for each of one or more suffixes, got {len(owners)} for {len(suffixes)}")
    for i, (suffix, owner) in enumerate(zip(suffixes, owners, strict=True)):
        if not 0 <= owner < len(prefixes):
            raise ValueError(f"suffix {i} continues prefix {owner}, but there are {len(prefixes)} prefixes")
        if not suffix or not prefixes[owner]:
            raise ValueError(
                f"suffix {i} and its prefix need a token each: got {len(suffix)} and {len(prefixes[owner])}"
            )
