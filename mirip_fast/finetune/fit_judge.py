"""How the end-to-end loop scores and judges a whole split."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from mirip_fast.errors import TrainingError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.finetune.fit_parts import Graded
from mirip_fast.finetune.memory import Passes
from mirip_fast.finetune.plan import Sample

if TYPE_CHECKING:
    from mirip_fast.finetune.fit import FullFit

log = logging.getLogger(__name__)

#: What a user can do where not even one image fits.
ADVICE = (
    "Out of memory with one image at a time. Ways on: --gradient-checkpointing, a smaller --image-size (and "
    "its own head-only run), --strategy last:2 or lora, or a smaller backbone. The checkpoints saved before "
    "are good."
)


def judge(fit: FullFit, images: Graded) -> tuple[float, float]:
    """Loss and pairwise accuracy over all pairs of a split, with the weights as they are.

    Raises:
        TrainingError: the loss is not finite, or one image does not fit into memory.
    """
    scores = scores_of(fit, images).to(fit.loss_device)
    grades = torch.from_numpy(images.grades).to(scores.device)
    within = None if images.within is None else torch.from_numpy(images.within).to(scores.device)
    loss = float(fit.objective.loss(scores, grades, within, mixed=False))
    fit.require_finite(loss)
    return loss, pairwise_accuracy(scores.cpu().numpy(), images.tiers, images.within)


@torch.no_grad()
def scores_of(fit: FullFit, images: Graded) -> torch.Tensor:
    """[n] scores of a split's images, nothing learnt.

    When memory runs out the passes become smaller, for the rest of the run too; scores do not depend on
    which images go through together.

    Raises:
        TrainingError: one image does not fit into memory.
    """
    fit.model.eval()
    n, plan, world = len(images.tiers), fit.plan, fit.peers.world
    mine = [Sample(i, 0) for i in range(n)[fit.peers.share(n)]]
    size = min(fit.judged_at_once, -(-plan.batch_size // (fit.parts_per_step * world)))
    passes = Passes(size, _tell)

    def score(inputs: torch.Tensor) -> torch.Tensor:
        with fit.autocast():
            return fit.score(inputs).float()

    parts = []
    try:
        for inputs in images.load([mine[i : i + size] for i in range(0, len(mine), size)]):
            parts.append(passes.run(score, inputs))
    except torch.OutOfMemoryError:
        raise TrainingError(ADVICE) from None
    if passes.images < size:
        fit.judged_at_once = passes.images
    own = torch.cat(parts) if parts else torch.empty(0, device=fit.device)
    return fit.peers.gather(own, n)


def _tell(images: int) -> None:
    log.warning(
        "Out of memory while judging: from here on at most %d images are scored at once", images
    )
