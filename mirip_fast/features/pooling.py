"""From a backbone's tokens to the features that are kept, and from those to what a head sees.

A *kind* says which tokens a series holds: ``cls``, ``mean`` (of the patch tokens), ``grid4`` (patch
tokens averaged over a 4 × 4 grid) or ``patch`` (every patch token). Register tokens are in none of them.
``cls_6`` and ``mean_6`` are those after block 6, put through the backbone's final norm; without a number
they are the last block's. Middle layers hold what the last one has given up: texture, colour, layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch


def stored_kinds(patches: str, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The kinds that ``--patches`` and ``--layers`` ask for; the CLS token is always kept, and beside a
    grid or all patches their mean, which a head sees.

    Args:
        patches: none, mean, grid:K or all.
        layers: blocks before the last one, whose CLS token and patch mean are kept, too.

    Raises:
        ConfigError: ``patches`` is none of these.
    """
    grid = re.fullmatch(r"grid:([1-9]\d?)", patches)
    kinds = {"none": ("cls",), "mean": ("cls", "mean"), "all": ("cls", "mean", "patch")}
    if grid is None and patches not in kinds:
        raise ConfigError(f"--patches {patches}: use none, mean, grid:K (like grid:4) or all")
    last = ("cls", "mean", f"grid{int(grid[1])}") if grid else kinds[patches]
    of_layer = ("cls",) if patches == "none" else ("cls", "mean")
    return (*last, *(f"{kind}_{layer}" for layer in layers for kind in of_layer))


def middle_layers(layers: str, depth: int) -> tuple[int, ...]:
    """The blocks that ``--layers`` names, without the last one, which is always kept; rising.

    Args:
        layers: ``last``; ``auto`` for each quarter of the depth; or numbers separated by commas:
            of blocks, counted from 1, or fractions of the depth such as 0.5.
        depth: blocks of the backbone.

    Raises:
        ConfigError: ``layers`` is none of these, or names a block that the backbone does not have.
    """
    if layers == "last":
        return ()
    if layers == "auto":
        return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0}))
    found = set()
    for word in layers.split(","):
        try:
            layer = round(float(word) * depth) if "." in word else int(word)
        except (ValueError, OverflowError):
            layer = 0
        if not 1 <= layer <= depth:
            raise ConfigError(
                f"--layers {layers}: use last, auto, or blocks from 1 to {depth} (fractions of the depth "
                "go as well), such as 6,9 or 0.5,0.75"
            )
        found.add(layer)
    return tuple(sorted(found - {depth}))


def layer_of(kind: str) -> int | None:
    """The block after which a kind's tokens are taken, counted from 1; None for the last one."""
    layer = kind.partition("@")[0].partition("_")[2]
    return int(layer) if layer else None


def kind_shape(kind: str, hidden_size: int, side: int) -> tuple[int, ...]:
    """Shape of one row: [D], [K, K, D] for a grid, [side², D] for all patches.

    Args:
        kind: as in the module's description.
        hidden_size: D, numbers per token.
        side: patches along one edge of the image.
    """
    kind = kind.partition("_")[0]
    if kind in ("cls", "mean"):
        return (hidden_size,)
    if kind == "patch":
        return (side * side, hidden_size)
    cells = int(kind.removeprefix("grid"))
    return (cells, cells, hidden_size)


def pool_tokens(kind: str, cls: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Pool one batch of tokens.

    Args:
        kind: as in the module's description.
        cls: [B, D] CLS tokens after the backbone's final norm, of the kind's layer.
        patches: [B, side, side, D] patch tokens, register tokens taken out.

    Returns:
        [B, *kind_shape(kind, D, side)], float32 (float64 for float64 tokens).
    """
    from torch.nn import functional

    kind = kind.partition("_")[0]
    if kind == "cls":
        return _at_least_float32(cls)
    patches = _at_least_float32(patches)
    if kind == "mean":
        return patches.mean(dim=(1, 2))
    if kind == "patch":
        return patches.flatten(1, 2)
    cells = int(kind.removeprefix("grid"))
    grid = functional.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), cells)
    return grid.permute(0, 2, 3, 1)


def _at_least_float32(tokens: torch.Tensor) -> torch.Tensor:
    return tokens if tokens.element_size() >= 4 else tokens.float()


def head_kinds(features: str) -> tuple[str, ...]:
    """The kinds that a head looks at, e.g. ``cls+mean`` → (``cls``, ``mean``)."""
    return tuple(features.split("+"))


def is_patches(kind: str) -> bool:
    """Whether a kind keeps several patch tokens of an image apart: a grid, or all of them."""
    return kind.startswith(("grid", "patch"))


def head_input(parts: list[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Join the kinds a head looks at into its input: the one place where that is done.

    Args:
        parts: per kind [n, *kind_shape], in the order of :func:`head_kinds`.

    Returns:
        [n, T · D], float32: the T tokens of all kinds behind each other.
    """
    flat = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
    joined = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
    return np.ascontiguousarray(joined, dtype=np.float32)
