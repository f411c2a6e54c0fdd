"""A layout tells the attention where the sequences of a packed row lie.

A *root* attends to itself. A *branch* continues a root: it attends to the root's keys and, causally, to its own. There
are two layouts. On a GPU in bfloat16, `Varlen` has every sequence's keys one after the other, as flash attention reads
them: nothing is padded, and no mask is needed. Elsewhere `Grids` lay the sequences side by side, with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogls.system.sizes import rounded_up


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """A grid lays sequences of a row side by side, padded on the right.

    Args:
        cells: index in the row of each cell of the grid [sequences * longest]
        tokens: index in the grid of each token of the row [tokens]
        longest: number of cells per sequence
    """

    cells: Tensor
    tokens: Tensor
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grids:
    """Grids are the layout for attention that is written out.

    Args:
        roots: layout of the roots
        branches: layout of the branches; None without any
        owners: number of the root that each branch continues [branches]
        mask: additive mask of the branches [branches, 1, longest, longest root + longest]; None without any
    """

    roots: Grid
    branches: Grid | None
    owners: Tensor
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Varlen:
    """Varlen is the layout for one call of flash attention over sequences of different lengths.

    The queries of a sequence lie in the row one after the other, and so do the keys of a root. The keys of a branch are
    those of its root and then its own, so that they have to be gathered where there are branches.

    Args:
        query_starts: index of the first query of each sequence, and the number of queries [sequences + 1]
        key_starts: index of the first key of each sequence, and the number of keys [sequences + 1]
        longest_query: largest number of queries of a sequence
        longest_key: largest number of keys of a sequence
        keys: index in the row of each key [keys]; None where keys lie as the row does
        uses: indices in `keys` that name a token of the row, for one token after the other [keys]
        use_starts: index in `uses` of the first of each token [tokens + 1]
    """

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None
    uses: Tensor
    use_starts: Tensor


def layout(
    roots: Sequence[int], branches: Sequence[int], owners: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Grids | Varlen:
    """Returns the layout of a row of roots, followed by branches.

    Args:
        roots: number of tokens of each root
        branches: number of tokens of each branch
        owners: number of the root that each branch continues
        device: device of all tensors
        dtype: dtype of the attention's queries; flash attention takes no float32
    """
    if device.type == "cpu" or dtype == torch.float32:
        return grids(roots, branches, owners, device, dtype)
    return varlen(roots, branches, owners, device)


def varlen(roots: Sequence[int], branches: Sequence[int], owners: Sequence[int], device: torch.device) -> Varlen:
    """Returns the layout for flash attention; the arguments are those of `layout`."""
    row = torch.arange(sum(roots) + sum(branches)).split([*roots, *branches])
    spans = [*row[: len(roots)], *(torch.cat([row[o], own]) for o, own in zip(owners, row[len(roots) :], strict=True))]
    keys = torch.cat(spans)
    places = lambda lengths: torch.tensor([0, *lengths]).cumsum(0)  # noqa: E731
    return Varlen(
        query_starts=places([*roots, *branches]).int().to(device),
        key_starts=places([len(span) for span in spans]).int().to(device),
        longest_query=max(*roots, *branches, 0),
        longest_key=max(map(len, spans)),
        keys=keys.to(device) if branches else None,
        uses=keys.argsort(stable=True).to(device),
        use_starts=places(keys.bincount().tolist()).to(device),
    )


def grids(
    roots: Sequence[int], branches: Sequence[int], owners: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Grids:
    """Returns the layout for attention that is written out; the arguments are those of `layout`."""
    root_grid = _grid(roots, device)
    branch_grid = _grid(branches, device) if branches else None
    lengths = torch.tensor([roots[owner] for owner in owners], device=device)
    return Grids(
        roots=root_grid,
        branches=branch_grid,
        owners=torch.tensor(owners, dtype=torch.long, device=device),
        mask=branch_grid and _branch_mask(root_grid.longest, lengths, branch_grid.longest, dtype),
    )


def _grid(lengths: Sequence[int], device: torch.device) -> Grid:
    longest = rounded_up(max(lengths), device)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    cells = torch.zeros(len(lengths), longest, dtype=torch.long)
    cells[inside] = torch.arange(sum(lengths))
    tokens = inside.flatten().nonzero()[:, 0]
    return Grid(cells=cells.flatten().to(device), tokens=tokens.to(device), longest=longest)


def _branch_mask(longest_root: int, root_lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Returns an additive mask [branches, 1, longest, longest root + longest].

    A token of a branch sees the tokens of its root, whose number is in `root_lengths` [branches], and those of the
    branch up to itself.
    """
    steps = torch.arange(longest, device=root_lengths.device)
    own = (steps[None, :] <= steps[:, None]).expand(len(root_lengths), -1, -1)
    root = torch.arange(longest_root, device=root_lengths.device) < root_lengths[:, None]
    seen = torch.cat([root[:, None, :].expand(-1, longest, -1), own], dim=2)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
