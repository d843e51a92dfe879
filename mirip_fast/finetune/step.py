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

import torch
from torch import Tensor, nn

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError
from mirip_fast.finetune.distributed import ALONE, ProcessGroup
from mirip_fast.models.losses import PairLoss, pair_loss
from mirip_fast.ranking.objective import ALL, by_grader, make_loss
from mirip_fast.runtime import is_out_of_memory

#: Scores a micro-batch, [b]; called twice, it must draw the same noise (seed the generators itself).
Part = Callable[[], Tensor]


def take_gradients(
    parts: Sequence[Part],
    n: int,
    loss_of: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    group: ProcessGroup = ALONE,
    scale: float = 1.0,
    compiled: bool = False,
) -> tuple[float, Tensor]:
    """Add the gradient of ``loss_of(all scores)`` to the parameters.

    Args:
        parts: one function per micro-batch of this process; none, where it has no image of the batch.
        n: images of the whole batch, all processes together.
        loss_of: [n] scores → scalar loss, the same in every process.
        parameters: what learns; their gradients must be unset before.
        group: the processes that share the batch.
        scale: factor on the gradient (fp16's loss scale).
        compiled: keep gradients on in the first pass too, so that a compiled model runs the very same
            graph (and draws the same noise) in both.

    Returns:
        The loss of the whole batch, and all its scores [n], detached.

    Raises:
        torch.OutOfMemoryError: in this process or in another one; gradients are then undefined.
    """
    parameters = list(parameters)
    device = parameters[0].device
    none = parameters[0].detach().new_empty(0)
    last: list[Tensor] = []  # the scores that have a graph

    def forward() -> Tensor:
        scores = []
        with torch.set_grad_enabled(compiled):
            scores += [part().detach() for part in parts[:-1]]
        last.extend(part() for part in parts[-1:])
        return torch.cat([*scores, *(score.detach() for score in last)]) if parts else none

    mine = _unless_out_of_memory(forward, group, device)
    scores = group.gather(mine, n).requires_grad_()
    loss = loss_of(scores)
    (by_score,) = torch.autograd.grad(loss, scores)
    own = by_score[group.share(n)] * scale

    def backward() -> Tensor:
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

    _unless_out_of_memory(backward, group, device)
    group.add_gradients(parameters)
    return float(loss.detach()), scores.detach()


def _unless_out_of_memory(
    work: Callable[[], Tensor], group: ProcessGroup, device: torch.device
) -> Tensor:
    """Do the work; when memory ran out in any process, all of them raise."""
    result: Tensor | None = None
    try:
        result = work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if group.any(result is None, device) or result is None:
        # Raised here and not from within, where the traceback would hold on to the activations.
        raise torch.OutOfMemoryError("a step does not fit into memory")
    return result


def make_objective(config: TrainConfig) -> PairLoss:
    """The loss over all pairs of a batch that the settings ask for.

    Raises:
        ConfigError: settings that do not go together.
    """
    if config.pairs != ALL:
        raise ConfigError(
            f"--pairs {config.pairs}: --full takes all pairs among the images of each batch; leave it out"
        )
    return make_loss(config)


def batch_loss(
    loss: PairLoss,
    scores: Tensor,
    grades: Tensor,
    within: Tensor | None,
    *,
    mixed: bool,
    graders: Tensor | None = None,
) -> Tensor:
    """The mean loss over all pairs of a batch.

    Of a mixed image the grade is the mixture of its two grades, by the same shares as the pixels. A pair of a
    mixed batch weighs as much as its grades differ (in tiers): two mixtures of nearly the same grade say
    nearly nothing, where a plain pair would call one of them the better.

    Args:
        loss: of :func:`make_objective`.
        scores: [n] floats.
        grades: [n] float64, higher is better; minus the tier, the tier_score, or a mixture of two such.
        within: [n] integers, pairs count inside one value; or None.
        mixed: whether images of this batch are mixtures.
        graders: [n, G] tiers by several graders, −1 for none, in place of ``grades``; of no mixtures.
    """
    if graders is not None:
        place, tiers, inside, weights = by_grader(graders, within)
        return loss(scores[place], tiers, inside, weights)
    if not mixed:
        labels = (-grades).round().long() if loss.label == "tier" else grades
        return loss(scores, labels, within)
    first, second = _pairs(grades, within)
    difference = grades[first] - grades[second]
    return pair_loss(
        scores[first],
        scores[second],
        difference.sign(),
        kind=loss.kind,
        margin=loss.margin,
        label_smoothing=loss.label_smoothing,
        weight=difference.abs(),
    )


def count_right(
    scores: Tensor,
    grades: Tensor,
    within: Tensor | None,
    *,
    mixed: bool,
    graders: Tensor | None = None,
) -> tuple[float, float]:
    """How many pairs of different grades are in the right order (ties count half), and of how many.

    Both are weighted by the difference of grades in a batch of mixtures: see :func:`batch_loss`.
    """
    if graders is not None:
        place, tiers, within, _ = by_grader(graders, within)
        scores, grades = scores[place], -tiers.double()
    first, second = _pairs(grades, within)
    difference = grades[first] - grades[second]
    weight = difference.abs() if mixed else (difference != 0).double()
    order = (scores[first] - scores[second]).sign() * difference.sign()
    return float((weight * (order + 1) / 2).sum()), float(weight.sum())


def _pairs(grades: Tensor, within: Tensor | None) -> tuple[Tensor, Tensor]:
    """[p], [p]: all pairs of a batch (some tens of images), with equal ``within`` where given."""
    first, second = torch.triu_indices(len(grades), len(grades), 1, device=grades.device)
    if within is not None:
        inside = within[first] == within[second]
        first, second = first[inside], second[inside]
    return first, second
