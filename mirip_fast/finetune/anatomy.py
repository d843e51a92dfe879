"""The parts of a vision transformer, found by what they are: embeddings, blocks, final norm.

``transformers`` gives its models other inner names from class to class and version to version, so that
nothing here goes by them, but for the tokens that no image ever reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mirip_fast.errors import BackboneError
from mirip_fast.features.backbone import UNUSED

#: Layer numbers of what is no block, see :func:`layer_of`.
EMBEDDINGS = -1


@dataclass(frozen=True)
class Anatomy:
    """A backbone's parts.

    Attributes:
        embeddings: patches, CLS and register tokens, positions.
        blocks: the transformer blocks, first to last.
        norm: the final norm.
        rotary: whether positions enter every block instead of the embeddings.
    """

    embeddings: nn.Module
    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    rotary: bool


def find_anatomy(model: nn.Module, num_layers: int) -> Anatomy:
    """The parts of a ``transformers`` vision model.

    Args:
        model: the bare model.
        num_layers: how many blocks it has.

    Raises:
        BackboneError: it is built in another way.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    children = dict(model.named_children())
    norms = [child for child in children.values() if isinstance(child, nn.LayerNorm)]
    embeddings = children.get("embeddings")
    if not lists or not norms or embeddings is None:
        raise BackboneError(
            f"{type(model).__name__} is no plain stack of embeddings, {num_layers} blocks and a final "
            "norm: only its head can be trained (`mirip-fast train --head-only`)"
        )
    rotary = any("rope" in name or "rotary" in name for name in children)
    return Anatomy(embeddings, tuple(lists[0]), norms[-1], rotary)


def layer_of(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """Every usable parameter's layer: −1 embeddings, 0 … L−1 blocks, L the final norm.

    Parameters that take no part in features (mask token, pooler) are left out.
    """
    layers: dict[int, int] = {}
    for i, part in enumerate((*anatomy.blocks, anatomy.norm)):
        layers.update((id(parameter), i) for parameter in part.parameters())
    return {
        name: layers.get(id(parameter), EMBEDDINGS)
        for name, parameter in model.named_parameters()
        if not any(unused in name for unused in UNUSED)
    }


def checkpoint_blocks(anatomy: Anatomy) -> None:
    """Keep no activations inside blocks that learn; backward computes them again (Chen et al. 2016).

    Noise inside a block is replayed by torch's own checkpointing.
    """
    for block in anatomy.blocks:
        block.forward = _checkpointed(block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return checkpointed


class _ReachedError(Exception):
    """Stops a forward pass where its tokens were wanted."""


def tokens_before(
    anatomy: Anatomy, cut: int, forward: Any
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """What block ``cut`` is given in a forward pass, which goes no further.

    Args:
        anatomy: the backbone's parts.
        cut: a block's number.
        forward: runs the backbone.

    Returns:
        The tokens [B, T, D], and the other positional and keyword arguments (rotary positions and the
        like, which depend on the image's size alone).
    """
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _ReachedError

    handle = anatomy.blocks[cut].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        forward()
    except _ReachedError:
        pass
    finally:
        handle.remove()
    args, kwargs = caught[0]
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def run_from(
    anatomy: Anatomy,
    cut: int,
    tokens: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Blocks ``cut`` to the last and the final norm on [B, T, D] tokens; see :func:`tokens_before`."""
    for block in anatomy.blocks[cut:]:
        out = block(tokens, *args, **kwargs)
        tokens = out[0] if isinstance(out, tuple) else out
    result: torch.Tensor = anatomy.norm(tokens)
    return result
