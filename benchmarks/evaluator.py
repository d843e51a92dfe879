"""Seconds that judging takes: everything `evaluate` tells about one pass of scores, without drawing pictures.

python benchmarks/evaluator.py [--images 10000] [--rounds 1000]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.report import evaluate
from mirip_fast.evaluation.text_table import format_table

TIERS = ("S", "A", "B", "C")


def made_up(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, tiers in the usual shares, and finer grades."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n).astype(np.float32)
    grades = scores + 0.8 * rng.logistic(size=n)
    return scores, np.searchsorted(np.quantile(-grades, [0.05, 0.37, 0.79]), -grades), grades


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1000)
    asked = parser.parse_args()
    n = asked.images
    scores, tiers, grades = made_up(n, 0)
    rng = np.random.default_rng(1)
    columns = {
        "groups": [f"g{g}" for g in rng.integers(0, n // 3 + 1, n)],
        "within": [f"w{w}" for w in rng.integers(0, 5, n)],
    }

    started = time.perf_counter()
    calibration = fit_calibration(*made_up(n, 2)[:2], TIERS, source="out-of-fold")
    rows = [["learning the calibration", f"{time.perf_counter() - started:.2f}"]]
    case = {
        "tier_names": TIERS,
        "image_ids": [str(i) for i in range(n)],
        "tier_scores": grades.tolist(),
        "rounds": asked.rounds,
    }
    for name, extra in (
        ("judging the order", {}),
        ("… in groups", {"groups": columns["groups"]}),
        ("… and the probabilities", {"groups": columns["groups"], "calibration": calibration}),
        ("… inside five departments", {**columns, "calibration": calibration}),
    ):
        started, used = time.perf_counter(), time.process_time()
        evaluate(scores, tiers, **case, **extra).to_dict()
        rows.append(
            [name, f"{time.perf_counter() - started:.2f} ({time.process_time() - used:.2f})"]
        )
    print(f"{n} images, {asked.rounds} bootstrap rounds; seconds (of which this process computed)")
    print(format_table(["what", "s"], rows, "lr"))


if __name__ == "__main__":
    main()
