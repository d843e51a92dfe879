"""How much more is learned from pairs that `label` chooses than from random ones, with a known grader.

    python benchmarks/label_simulation.py DATA [--backbone DIR] [--seeds 6] [--noise 0] [--errs 0.1]

DATA is a graded folder with images/ and metadata.csv (columns filename and a finer grade, tier_score). Its
images are taken as a folder without grades; the grader, who stands for the judge, compares the grades. With
--noise X he errs as people do, more often the nearer two works are: he prefers the better one with
probability σ(difference / X), X in the unit of the grades. With --errs P he says the contrary of what he
means with probability P, whatever the works.

Both ways of choosing have the same measuring and repeated pairs and the same split; it is learned from them
as `label` does. Told is the share of pairs of works that it puts in the grades' order: works of
the test split, from which nothing was learned, and works of the train split among each other, which is what
somebody who sorts one folder looks at. Intervals are t intervals over the seeds; differences are paired.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mirip_fast.config import Config
from mirip_fast.data.splits import SPLITS
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.label.choice import Chooser, Pair
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.works import LabelWorks, prepare_works, train_once, training_config
from mirip_fast.settings import resolve

Array = NDArray[np.float64]
Grader = Callable[[Pair], int]

WAYS = ("random", "informative")
PLACES = ("works not judged", "works judged")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--cache-dir", default="cache")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--errs", type=float, default=0.0)
    parser.add_argument("--judgements", type=int, nargs="+", default=[50, 100, 200, 400])
    arguments = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.ERROR)
    found: dict[tuple[str, int], list[list[float]]] = {}
    seconds = []
    for seed in range(arguments.seeds):
        works, config = prepared(arguments, seed)
        grades = grades_of(arguments.data, works)
        for way in WAYS:
            started = time.monotonic()
            for count, accuracies in simulate(
                works,
                config,
                grades,
                way,
                arguments.judgements,
                arguments.noise,
                arguments.errs,
                seed,
            ):
                found.setdefault((way, count), []).append(accuracies)
                print(seed, way, count, *(f"{value:.4f}" for value in accuracies), flush=True)
            seconds.append(time.monotonic() - started)
    print(
        f"\n{len(works)} works, {arguments.seeds} seeds, noise {arguments.noise:g}, errs {arguments.errs:g}"
    )
    for place, name in enumerate(PLACES):
        rows = []
        for count in arguments.judgements:
            random, chosen = (np.array(found[way, count])[:, place] for way in WAYS)
            half = found.get((WAYS[1], count // 2))
            saved = "" if half is None else spread(np.array(half)[:, place] - random, signed=True)
            gained = spread(chosen - random, signed=True)
            rows.append((str(count), spread(random), spread(chosen), gained, saved))
        print(f"\nPairwise accuracy, {name}")
        header = ("judgements", *WAYS, "difference", "informative after half, less random")
        print(format_table(header, rows, align="rrrrr"))


def prepared(arguments: argparse.Namespace, seed: int) -> tuple[LabelWorks, Config]:
    """The works with a split of their own for the seed."""
    given = {
        "embed.cache_dir": arguments.cache_dir,
        "embed.image_size": arguments.image_size,
        "embed.backbone": arguments.backbone,
        "split.split_seed": seed,
        "split.train_ratio": 0.7,
        "split.val_ratio": 0.1,
        "split.test_ratio": 0.2,
        "train.seed": seed,
    }
    resolved = resolve((), given)
    return prepare_works(arguments.data / "images", resolved), resolved.config


def grades_of(data: Path, works: LabelWorks) -> Array:
    """[n] the grades behind the grader's verdicts."""
    with (data / "metadata.csv").open(encoding="utf-8-sig", newline="") as stream:
        known = {row["filename"]: float(row["tier_score"]) for row in csv.DictReader(stream)}
    return np.array([known[works.name(i)] for i in range(len(works))])


def grader_of(grades: Array, noise: float, errs: float, seed: int) -> Grader:
    """Compares grades; errs with probability 1 − σ(difference / noise), and with ``errs`` besides."""
    rng = np.random.default_rng([seed, 77])

    def grade(pair: Pair) -> int:
        gap = grades[pair.one] - grades[pair.other]
        if gap == 0:
            return 0
        if noise and rng.random() > 1 / (1 + np.exp(-abs(gap) / noise)):
            gap = -gap
        if errs and rng.random() < errs:
            gap = -gap
        return 1 if gap > 0 else -1

    return grade


def simulate(
    works: LabelWorks,
    config: Config,
    grades: Array,
    way: str,
    counts: Sequence[int],
    noise: float,
    errs: float,
    seed: int,
) -> list[tuple[int, list[float]]]:
    """Accuracies after so many judgements."""
    chooser = Chooser(
        {split: works.in_split(split) for split in SPLITS},
        works.features,
        works.blocks,
        dataclasses.replace(config.label, choose=way),
        seed=seed,
    )
    grade = grader_of(grades, noise, errs, seed)
    judged: list[Pair] = []
    results = []
    with tempfile.TemporaryDirectory() as folder, JudgementFile(Path(folder) / "pairs.csv") as file:
        while len(judged) < max(counts):
            pair = chooser.next(judged)
            judged.append(dataclasses.replace(pair, label=grade(pair)))
            names = {
                "image_path_1": works.name(pair.one),
                "image_path_2": works.name(pair.other),
                "label": str(judged[-1].label),
            }
            file.append(names)
            if len(judged) in counts:
                training = training_config(config, file.path)
                scores = train_once(training, works.dataset.source, works.images.hashes)
                results.append((len(judged), accuracies(scores.astype(float), works, grades)))
    return results


def accuracies(scores: Array, works: LabelWorks, grades: Array) -> list[float]:
    """Of the works of the test split, and of those of the train split."""
    return [in_order(scores[part], grades[part]) for part in map(works.in_split, ("test", "train"))]


def in_order(scores: Array, grades: Array) -> float:
    """Share of the pairs with different grades whose scores are in the grades' order; a tie counts half."""
    agree = np.sign(scores[:, None] - scores) * np.sign(grades[:, None] - grades)
    return float((1 + agree[grades[:, None] != grades]).mean() / 2)


def spread(values: Array, *, signed: bool = False) -> str:
    """Mean and 95 % t interval."""
    mean = values.mean()
    if len(values) < 2:
        return f"{mean:+.3f}" if signed else f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    form = "{:+.3f} ({:+.3f} – {:+.3f})" if signed else "{:.3f} ({:.3f} – {:.3f})"
    return form.format(mean, mean - half, mean + half)


if __name__ == "__main__":
    main()
