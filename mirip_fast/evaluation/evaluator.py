"""The evaluator of the documented interface: how often a model orders a pair of images rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import DataError, ImageError
from mirip_fast.evaluation.metrics import listed_accuracy
from mirip_fast.models.losses import check_pairs, describe, one_column
from mirip_fast.models.ranking_model import PairwiseRankingModel
from mirip_fast.runtime import resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

#: Batches of (first images [B, 3, H, W], second images, labels [B] of 1, −1 or 0 for a tie).
PairLoader = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def score_pairs(
    model: nn.Module, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of images through any model that gives two scores.

    Args:
        model: ``forward(first, second)`` gives two tensors, each [B] or [B, 1].
        first: [B, 3, H, W].
        second: [B, 3, H, W].

    Returns:
        The scores, [B] and [B].

    Raises:
        ValueError: the model gives something else; says what.
    """
    given = model(first, second)
    if not isinstance(given, tuple | list) or len(given) != 2:
        what = describe(given) if isinstance(given, torch.Tensor) else type(given).__name__
        several = f" of {len(given)}" if isinstance(given, tuple | list | dict) else ""
        raise ValueError(f"the model must give two tensors of scores, not {what}{several}")
    score1, score2 = (
        one_column(given[0], "the first scores"),
        one_column(given[1], "the second scores"),
    )
    if not len(score1) == len(score2) == len(first):
        shapes = " and ".join(map(describe, given))
        raise ValueError(
            f"the model must give one score for each of {len(first)} images, not {shapes}"
        )
    return score1, score2


class Evaluator:
    """Evaluates a model by pairs of images.

    Args:
        model: any module whose ``forward(first images, second images)`` gives two scores, each [B] or [B, 1].
        device: where to compute (``auto``, ``cpu``, ``cuda`` …).
    """

    def __init__(self, model: nn.Module, device: str | torch.device = "auto"):
        self.device = resolve_device(str(device))
        self.model = model.to(self.device)

    def evaluate(self, loader: PairLoader) -> float:
        """Pairwise accuracy in 0–1; a tie of scores counts ½, ties of the labels do not count."""
        accuracy: float = self.evaluate_detailed(loader)["accuracy"]
        return accuracy

    @torch.inference_mode()
    def evaluate_detailed(self, loader: PairLoader) -> dict[str, Any]:
        """Counts behind the accuracy.

        Returns:
            total_pairs: pairs with a better and a worse image.
            correct_predictions: of those, pairs ordered rightly; ties of scores count ½.
            tied_predictions: of those, pairs with equal scores.
            accuracy: correct_predictions / total_pairs.
            mean_margin: mean score difference, better minus worse.

        Raises:
            DataError: no pair has a better image, or a score is not finite.
            ValueError: scores or labels have another shape than [B] or [B, 1].
        """
        self.model.eval()
        margins = [torch.empty(0, dtype=torch.float64)]
        for first, second, labels in loader:
            scores = score_pairs(self.model, first.to(self.device), second.to(self.device))
            score1, score2, signs = check_pairs(*scores, labels.to(scores[0].device))
            margins.append(((score1.double() - score2.double()) * signs)[signs != 0].cpu())
            if not bool(margins[-1].isfinite().all()):
                raise DataError(
                    "the model gives scores that are not finite: no order follows from them"
                )
        listed = torch.cat(margins).numpy()
        total, tied = len(listed), int((listed == 0).sum())
        if total == 0:
            raise DataError("there is no pair of a better and a worse image to evaluate on")
        correct = int((listed > 0).sum()) + tied / 2
        return {
            "total_pairs": total,
            "correct_predictions": int(correct) if correct == int(correct) else correct,
            "tied_predictions": tied,
            "accuracy": listed_accuracy(listed),
            "mean_margin": float(listed.mean()),
        }


@torch.inference_mode()
def batch_compare(
    model: nn.Module,
    image_pairs: Sequence[tuple[str | Path, str | Path]],
    transform: Callable[[Image], torch.Tensor],
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Compare pairs of image files; a :class:`PairwiseRankingModel` scores every file once.

    Args:
        model: the trained model: any module whose ``forward`` gives two scores, [B] or [B, 1].
        image_pairs: pairs of paths.
        transform: PIL image → normalised tensor [3, H, W].
        device: where to compute.

    Returns:
        Per pair: image1, image2 (as given), score1, score2, winner (``image1`` or ``image2``; the second
        one where the scores are equal) and confidence (absolute difference of the scores).

    Raises:
        ImageError: a file cannot be decoded; names it.
        ValueError: the model gives something else than two scores.
    """
    target = resolve_device(device)
    model = model.to(target).eval()

    def read(paths: Sequence[str]) -> Iterator[torch.Tensor]:
        for path, picture in zip(paths, load_pictures(map(Path, paths)), strict=True):
            if isinstance(picture, ImageError):
                raise ImageError(f"{path}: {picture}")
            yield transform(picture).unsqueeze(0).to(target)

    listed = [str(path) for pair in image_pairs for path in pair]
    if isinstance(model, PairwiseRankingModel):  # whose score of an image is the same in every pair
        once = list(dict.fromkeys(listed))
        known = {
            path: float(model.score(image)[0]) for path, image in zip(once, read(once), strict=True)
        }
        scores = iter([known[path] for path in listed])
    else:
        images = read(listed)
        pairs = (score_pairs(model, first, next(images)) for first in images)
        scores = (float(score[0]) for pair in pairs for score in pair)
    results = []
    for first, second in image_pairs:
        score1, score2 = next(scores), next(scores)
        results.append(
            {
                "image1": first,
                "image2": second,
                "score1": score1,
                "score2": score2,
                "winner": "image1" if score1 > score2 else "image2",
                "confidence": abs(score1 - score2),
            }
        )
    return results
