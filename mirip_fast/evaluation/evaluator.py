"""The evaluator of the documented interface: how often a model orders a pair of images rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import DataError, ImageError
from mirip_fast.runtime import resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

    from mirip_fast.models.ranking_model import PairwiseRankingModel

#: Batches of (first images [B, 3, H, W], second images, labels [B] of 1, −1 or 0 for a tie).
PairLoader = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Evaluator:
    """Judges a model by pairs of images.

    Args:
        model: gives two scores for two batches of images.
        device: where to compute (``auto``, ``cpu``, ``cuda`` …).
    """

    def __init__(self, model: PairwiseRankingModel, device: str | torch.device = "auto"):
        self.device = resolve_device(str(device))
        self.model = model.to(self.device)

    def evaluate(self, loader: PairLoader) -> float:
        """Pairwise accuracy in 0–1; a tie of scores counts ½, pairs judged equal do not count."""
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
            DataError: no pair has a better image.
        """
        self.model.eval()
        total = tied = 0
        correct = margin_sum = 0.0
        for first, second, labels in loader:
            score1, score2 = self.model(first.to(self.device), second.to(self.device))
            signs = labels.to(score1.device).double()
            margins = ((score1 - score2).double() * signs)[signs != 0]
            total += margins.numel()
            tied += int((margins == 0).sum())
            correct += float((margins > 0).sum() + 0.5 * (margins == 0).sum())
            margin_sum += float(margins.sum())
        if total == 0:
            raise DataError("there is no pair of a better and a worse image to evaluate on")
        return {
            "total_pairs": total,
            "correct_predictions": int(correct) if correct == int(correct) else correct,
            "tied_predictions": tied,
            "accuracy": correct / total,
            "mean_margin": margin_sum / total,
        }


@torch.inference_mode()
def batch_compare(
    model: PairwiseRankingModel,
    image_pairs: Sequence[tuple[str | Path, str | Path]],
    transform: Callable[[Image], torch.Tensor],
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Compare pairs of image files; every file is read and scored once.

    Args:
        model: the trained model.
        image_pairs: pairs of paths.
        transform: PIL image → normalised tensor [3, H, W].
        device: where to compute.

    Returns:
        Per pair: image1, image2 (as given), score1, score2, winner (``image1`` or ``image2``; the second
        one where the scores are equal) and confidence (absolute difference of the scores).

    Raises:
        ImageError: a file can not be decoded; names it.
    """
    target = resolve_device(device)
    model = model.to(target).eval()
    scores: dict[str, float] = {}
    paths = list(dict.fromkeys(str(path) for pair in image_pairs for path in pair))
    for path, picture in zip(paths, load_pictures(map(Path, paths)), strict=True):
        if isinstance(picture, ImageError):
            raise ImageError(f"{path}: {picture}")
        scores[path] = float(model.score(transform(picture).unsqueeze(0).to(target))[0])
    results = []
    for first, second in image_pairs:
        score1, score2 = scores[str(first)], scores[str(second)]
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
