"""How often intervals of the calibration error and of pairwise accuracy hold the truth, where it is known.

The first table: independent works. The second: groups of eight works, whose grades and scores differ from
group to group, too.

python benchmarks/calibration_coverage.py [--sets 150]
"""

from __future__ import annotations

import argparse

import numpy as np

from mirip_fast.evaluation.bootstrap import accuracy_interval
from mirip_fast.evaluation.calibration import fit_temperature
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.text_table import format_table


def world(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and tiers of a grade that is the score and logistic noise."""
    scores = rng.normal(size=n)
    grade = scores + 0.6 * rng.logistic(size=n)
    return scores, 3 - np.searchsorted([-1.3, 0.3, 1.9], grade)


def grouped(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores, tiers and group names of eight works per group."""
    of = np.repeat(np.arange(groups), 8)
    grade = 0.6 * rng.normal(size=groups)[of] + rng.normal(size=len(of))
    scores = grade + 0.7 * rng.normal(size=groups)[of] + 0.8 * rng.normal(size=len(of))
    return scores, 3 - np.searchsorted([-1.5, 0.0, 1.2], grade), [f"g{i}" for i in of]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=150, help="test sets per line")
    asked = parser.parse_args()
    rng = np.random.default_rng(1)
    scores, tiers = world(rng, 10_000)
    right = fit_temperature(scores, tiers)["value"]
    rows = []
    for n in (60, 250):
        for factor in (1.0, 0.5, 2.0):
            exact = reliability(scores, tiers, factor * right, rounds=0)
            assert exact is not None
            held, widths, estimates = 0, [], []
            for seed in range(asked.sets):
                found = reliability(*world(rng, n), factor * right, rounds=200, seed=seed)
                assert found is not None and found["interval"] is not None
                held += found["interval"].low <= exact["ece"] <= found["interval"].high
                widths.append(found["interval"].high - found["interval"].low)
                estimates.append(found["ece"])
            rows.append(
                [
                    n, f"{factor:g} T", f"{exact['ece']:.4f}", f"{np.mean(estimates):.4f}",
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
    true = np.mean([pairwise_accuracy(*grouped(rng, 500)[:2]) for _ in range(5)])
    rows = []
    for groups in (4, 6, 10, 20, 40):
        spans = [
            accuracy_interval(*grouped(rng, groups), rounds=400, seed=seed)
            for seed in range(asked.sets)
        ]
        held = [span is not None and span.low <= true <= span.high for span in spans]
        width = np.mean([span.high - span.low for span in spans if span is not None])
        rows.append([groups, f"{true:.4f}", f"{np.mean(held):.0%}", f"{width:.3f}"])
    headers = ["groups", "true accuracy", "held by 95 % interval", "mean width"]
    print(format_table(headers, rows, "rrrr"))


if __name__ == "__main__":
    main()
