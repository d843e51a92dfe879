"""One training step: every image once through the model, every pair among the scores.

The loss of a batch is a function of its B scores, so its gradient by the weights is that of the scores,
weighted by the derivative of the loss by each score. Micro-batches therefore need nothing but these B
numbers from each other: first the scores of all (without keeping activations), then the derivative of
the loss, then each micro-batch once more, forward and backward. That is the gradient of the whole batch,
not an average of parts (as in GradCache, Gao et al. 2021, arXiv 2101.06983). The last micro-batch is run
once only, so that K of them cost (K − 1)/K of a forward pass extra, and one costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mirip_fast.finetune.peers import ALONE, Peers
from mirip_fast.runtime import is_out_of_memory

#: Scores a micro-batch, [b]; called twice, it must draw the same noise (seed the generators itself).
Part = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step saw: the loss of the whole batch, and all its scores [B], detached."""

    loss: float
    scores: torch.Tensor


def take_gradients(
    parts: Sequence[Part],
    n: int,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    peers: Peers = ALONE,
    scale: float = 1.0,
    compiled: bool = False,
) -> StepResult:
    """Add the gradient of ``loss_of(all scores)`` to the parameters.

    Args:
        parts: one function per micro-batch of this process; none, where it has no image of the batch.
        n: images of the whole batch, all processes together.
        loss_of: [n] scores → scalar loss, the same in every process.
        parameters: what learns; their gradients must be unset before.
        peers: the processes that share the batch.
        scale: factor on the gradient (fp16's loss scale).
        compiled: keep gradients on in the first pass too, so that a compiled model runs the very same
            graph (and draws the same noise) in both.

    Raises:
        torch.OutOfMemoryError: in this process or in another one; gradients are then undefined.
    """
    parameters = list(parameters)
    device = parameters[0].device
    none = parameters[0].detach().new_empty(0)
    last: list[torch.Tensor] = []  # the scores that have a graph

    def forward() -> torch.Tensor:
        scores = []
        with torch.set_grad_enabled(compiled):
            scores += [part().detach() for part in parts[:-1]]
        last.extend(part() for part in parts[-1:])
        return torch.cat([*scores, *(score.detach() for score in last)]) if parts else none

    mine = _unless_out_of_memory(forward, peers, device)
    scores = peers.gather(mine, n).requires_grad_()
    loss = loss_of(scores)
    (by_score,) = torch.autograd.grad(loss, scores)
    own = by_score[peers.share(n)] * scale

    def backward() -> torch.Tensor:
        done = len(mine) - sum(len(score) for score in last)
        for score in last:
            score.backward(own[done:].to(score.dtype))  # type: ignore[no-untyped-call]
        last.clear()
        start = 0
        for part in parts[:-1]:
            score = part()
            end = start + len(score)
            score.backward(own[start:end].to(score.dtype))  # type: ignore[no-untyped-call]
            start = end
        return own

    _unless_out_of_memory(backward, peers, device)
    peers.add_gradients(parameters)
    return StepResult(float(loss.detach()), scores.detach())


def _unless_out_of_memory(
    work: Callable[[], torch.Tensor], peers: Peers, device: torch.device
) -> torch.Tensor:
    """Do the work; when memory ran out in any process, all of them raise."""
    result: torch.Tensor | None = None
    try:
        result = work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if peers.any(result is None, device) or result is None:
        # Raised here and not from within, where the traceback would hold on to the activations.
        raise torch.OutOfMemoryError("a step does not fit into memory")
    return result
