"""How often intervals of the calibration error hold the true error, in worlds where it is known.

python benchmarks/calibration_coverage.py [--sets 150]
"""

from __future__ import annotations

import argparse

import numpy as np

from mirip_fast.evaluation.calibration import fit_temperature
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.text_table import format_table


def world(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and tiers of a grade that is the score and logistic noise."""
    scores = rng.normal(size=n)
    grade = scores + 0.6 * rng.logistic(size=n)
    return scores, 3 - np.searchsorted([-1.3, 0.3, 1.9], grade)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=150, help="test sets per line")
    asked = parser.parse_args()
    rng = np.random.default_rng(1)
    scores, tiers = world(rng, 10_000)
    right = fit_temperature(scores, tiers).value
    rows = []
    for n in (60, 250):
        for factor in (1.0, 0.5, 2.0):
            exact = reliability(scores, tiers, factor * right, rounds=0)
            assert exact is not None
            held, widths, estimates = 0, [], []
            for seed in range(asked.sets):
                found = reliability(*world(rng, n), factor * right, rounds=200, seed=seed)
                assert found is not None and found.interval is not None
                held += found.interval.low <= exact.ece <= found.interval.high
                widths.append(found.interval.high - found.interval.low)
                estimates.append(found.ece)
            rows.append(
                [
                    n, f"{factor:g} T", f"{exact.ece:.4f}", f"{np.mean(estimates):.4f}",
                    f"{held / asked.sets:.0%}", f"{np.mean(widths):.3f}",
                ]
            )  # fmt: skip
    headers = [
        "works",
        "used",
        "true error",
        "mean estimate",
        "held by 95 % interval",
        "mean width",
    ]
    print(format_table(headers, rows, "rlrrrr"))


if __name__ == "__main__":
    main()
