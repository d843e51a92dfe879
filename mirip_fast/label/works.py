"""The works that are judged, divided as training will divide them, and the heads trained on the judgements.

Heads are trained in a process of its own, which reads jobs from its standard input and answers on its
standard output, one JSON object per line, and ends when its input ends: the page never waits for training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.splits import SPLITS
from mirip_fast.errors import DataError, MiripError
from mirip_fast.features.datasets import Dataset, find_datasets, newest_dataset
from mirip_fast.features.embed import OnProgress
from mirip_fast.features.phase_one import embed_data
from mirip_fast.features.recipe import head_kinds
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import temporary_folder
from mirip_fast.models.preference import fit_pairs
from mirip_fast.ranking.graded import (
    GradedImages,
    gp_features,
    graded_of_dataset,
    images_of_dataset,
    left_out,
)
from mirip_fast.ranking.judged_pairs import JudgedPairs, read_judged_pairs
from mirip_fast.ranking.objective import pairs_files
from mirip_fast.ranking.readouts import FEW_PAIRS, MOST_WORKS
from mirip_fast.ranking.rows import open_store, read_features
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.ranking.train import train_head
from mirip_fast.settings import Resolved, config_from_dict
from mirip_fast.text import counted, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Settings that only say how fast or where to embed, and not what.
_HOW = {"embed.cache_dir", "embed.workers", "embed.embed_batch_size", "embed.compile"}


@dataclass(frozen=True)
class LabelWorks:
    """n works of a data set, in the order of training.

    Attributes:
        dataset: the embedded data set.
        images: the works, each with its content hash and its split.
        others: images of the data set that could not be embedded; a file of pairs may name them.
        shown: [n] bool; the others are never put before the judge.
        features: [n, D] float32, CLS and patch mean of every stored layer, of the base view.
        blocks: numbers per kind in a row of features.
        store: where the features are.
    """

    dataset: Dataset
    images: GradedImages
    others: pd.DataFrame
    shown: NDArray[np.bool_]
    features: NDArray[np.float32]
    blocks: Sequence[int]
    store: FeatureStore

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        """What a file of pairs calls a work: its file, as the data set names it."""
        return self.images.names[number]

    def path(self, number: int) -> Path:
        """The file of a work."""
        return Path(self.images.table["file"].iloc[number])

    def in_split(self, split: str) -> NDArray[np.int64]:
        """The works of one split that may be shown."""
        return np.flatnonzero((np.array(self.images.splits) == split) & self.shown)


def prepare_works(
    folder: Path,
    resolved: Resolved,
    *,
    compared: bool = True,
    command: str = "",
    progress: OnProgress = lambda *_: None,
) -> LabelWorks:
    """Embed what is missing and take the works as ``train --pairs`` will take them.

    A folder that was embedded before is embedded as it was then; a new one as the newest data set of the
    cache was, so that its models fit; without any, as the settings say. Settings that are given count.

    Args:
        folder: folder of images, with grades or without, or a CSV file.
        resolved: the settings, and which of them were given.
        compared: whether there must be enough works of each split to compare.
        command: what is running, for whoever finds the store locked.
        progress: called while images are embedded.

    Raises:
        DataError: no image can be read, or there are too few to compare.
        BackboneError: features are missing and the backbone cannot be found.
    """
    config = _as_embedded(folder, resolved)
    dataset = embed_data(folder, config, command=command, progress=progress).dataset
    if dataset is None:
        raise DataError("label runs as one process: start it without torchrun")
    if compared:
        images = graded_of_dataset(dataset, config.split, need_tiers=False)
    else:
        images = images_of_dataset(dataset)
    store = FeatureStore.open(dataset.store_path)
    features, blocks = _preference_rows(dataset, store, images.hashes, config)
    keep = _may_be_shown(images)
    works = LabelWorks(dataset, images, left_out(dataset), keep, features, blocks, store)
    for split in SPLITS[:2] if compared else ():
        if len(works.in_split(split)) < 2:
            raise DataError(
                f"{shown(folder)}: the {split} split has {counted(len(works.in_split(split)), 'work')} that "
                f"can be compared; two are needed. {counted(int(works.shown.sum()), 'work')} can be shown in "
                "all: add images, or give larger shares (--train-ratio 0.6 --val-ratio 0.3 --test-ratio 0.1)."
            )
    return works


def _preference_rows(
    dataset: Dataset, store: FeatureStore, hashes: Sequence[bytes], config: Config
) -> tuple[NDArray[np.float32], Sequence[int]]:
    """What judgements are learned from: [n, D] features of the base view, and numbers per kind."""
    kind = gp_features(config.head.features, dataset.info["kinds"])
    rows = read_features(store, hashes, kind, dataset.views()[:1])[:, 0]
    count = len(head_kinds(kind))
    return rows, [rows.shape[1] // count] * count


def _as_embedded(folder: Path, resolved: Resolved) -> Config:
    config, given = resolved.config, resolved.given
    datasets = find_datasets(Path(config.embed.cache_dir))
    same = next((dataset for dataset in datasets if dataset.is_called(folder)), None)
    if same is not None and not any(key.startswith("data.") for key in given):
        config = dataclasses.replace(config, data=same.data)
    model = same or next(iter(datasets), None)
    if model is None or any(key.startswith("embed.") and key not in _HOW for key in given):
        return config
    embed = dataclasses.replace(
        model.embed,
        cache_dir=config.embed.cache_dir,
        workers=config.embed.workers,
        embed_batch_size=config.embed.embed_batch_size,
        compile=False,
    )
    return dataclasses.replace(config, embed=embed)


def _may_be_shown(images: GradedImages) -> NDArray[np.bool_]:
    """Leave out what no file of pairs can name, links that lead elsewhere, and second copies; tell it."""
    manifest = images
    places = {place.resolve() for place in (manifest.root, *manifest.places)}
    names = manifest.names
    composed = [nfc(name) for name in names]
    times = Counter(composed)
    keep = np.ones(len(images), dtype=bool)
    seen: set[bytes] = set()
    reasons: Counter[str] = Counter()
    for i, (path, sha) in enumerate(zip(manifest.paths, images.hashes, strict=True)):
        real = path.resolve()
        if not any(real.is_relative_to(place) for place in places):
            why = "outside the folder (a link, or a path in the CSV file)"
        elif not _can_be_written(names[i]) or times[composed[i]] > 1:
            why = "with a name that no CSV file can hold or tell apart"
        elif sha in seen:
            why = "with the same bytes as another"
        else:
            seen.add(sha)
            continue
        keep[i] = False
        reasons[why] += 1
    for why, count in reasons.items():
        log.warning("%s not shown: %s", counted(count, "work"), why)
    return keep


def _can_be_written(name: str) -> bool:
    """Whether the name comes back as it is from a CSV file in UTF-8, whose cells lose blanks around them."""
    surrogates = any(0xD800 <= ord(c) < 0xE000 for c in name)
    return name == name.strip() and "\0" not in name and not surrogates


# Training on the judgements.

# Not `python -m`: that would depend on the working folder and the environment.
_START = (
    "import json, sys; sys.path[:], parent = json.loads(sys.argv[1]); "
    "from mirip_fast.runtime import end_with_parent; end_with_parent(parent); "
    "from mirip_fast.label.works import serve_training; serve_training()"
)
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class Retrainer:
    """Trains one head at a time in a process of its own.

    Args:
        config: settings of the training, see :func:`training_config`.
        works: what is scored.
        done: called from another thread with the number of judgements when training began, the answer
            (``scores`` [n] of all works, or ``error``), and the seconds it took.
    """

    def __init__(
        self, config: Config, works: LabelWorks, done: Callable[[int, dict[str, Any], float], None]
    ):
        self._job = {
            "config": config.to_dict(),
            "source": str(works.dataset.source),
            "hashes": [sha.hex() for sha in works.images.hashes],
        }
        self._done = done
        self._process: subprocess.Popen[str] | None = None
        # The process is started in this thread, as Linux ends it when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "mirip-retrain")
        self._training: Future[None] | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a head is being trained."""
        return self._training is not None and not self._training.done()

    def start(self, judgements: int) -> None:
        """Train on the file as it is now, unless a head is being trained already."""
        if not self.busy and not self._closed:
            self._training = self._thread.submit(self._train, judgements)

    def wait(self, seconds: float | None = None) -> None:
        """Until the training that was started is over."""
        if self._training is not None:
            futures.wait([self._training], seconds)

    def close(self) -> None:
        """End the process; a training that is under way is given up."""
        self._closed = True
        self._end_process()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.wait(5)
        if self._process is not None and not self.busy:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _train(self, judgements: int) -> None:
        started = time.monotonic()
        try:
            answer = self._ask()
        except (OSError, ValueError) as error:
            answer = {"error": f"the process that trains ended ({error})"}
            self._process = None
        if not self._closed:
            self._done(judgements, answer, time.monotonic() - started)

    def _ask(self) -> dict[str, Any]:
        if self._process is None:
            arguments = json.dumps([[_PACKAGE_PARENT, *sys.path], os.getpid()])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                # Ctrl-C is for the server, which then ends this one.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            if self._closed:  # while it was being started
                self._end_process()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ValueError("no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def training_config(config: Config, pairs: Path) -> Config:
    """The session's settings as ``train --head-only --pairs FILE`` takes them."""
    train = dataclasses.replace(config.train, pairs=str(pairs), label="pairs", folds=0)
    tracking = dataclasses.replace(config.tracking, report_to="none")
    return dataclasses.replace(config, train=train, tracking=tracking)


def train_once(config: Config, source: Path, hashes: Sequence[bytes]) -> NDArray[np.floating]:
    """Learn from the judgements and score works; nothing is kept.

    A few judgements (:data:`mirip_fast.ranking.readouts.FEW_PAIRS`) are learned by a Gaussian process of
    preferences, more by a head, as ``train --pairs`` does; but here from the works of the train split alone,
    so that those of val and test measure.

    Args:
        config: settings, see :func:`training_config`.
        source: the embedded data set.
        hashes: contents of the n works to score.

    Returns:
        [n] scores.

    Raises:
        MiripError: it cannot be trained on; says why.
    """
    cache = Path(config.embed.cache_dir)
    dataset = newest_dataset(cache, source)
    images = graded_of_dataset(dataset, config.split, need_tiers=False)
    files, zero = pairs_files(config.train), config.train.pairs_zero
    judged = JudgedPairs.of(read_judged_pairs(files, images, dataset, zero), images)
    here = np.array([split == "train" for split in judged.splits], dtype=bool)
    if here.sum() >= FEW_PAIRS or config.head.readout == "head":
        with temporary_folder() as folder:
            train = dataclasses.replace(config.train, output_dir=str(folder), save_every_n_epochs=0)
            run, _ = train_head(dataclasses.replace(config, train=train), source)
            model = load_score_model(run.model)
            return model.score(open_store(cache, model.info), hashes)
    store = FeatureStore.open(dataset.store_path)
    pairs = judged.images[here]
    # The others only say what is usual, and would take the square of their number.
    used = np.flatnonzero(np.array(images.splits) == "train")
    used = used if len(used) <= MOST_WORKS else np.unique(pairs)
    rows, blocks = _preference_rows(dataset, store, [images.hashes[i] for i in used], config)
    verdicts = judged.label[here], judged.weight[here]
    posterior = fit_pairs(rows, np.searchsorted(used, pairs), *verdicts, blocks=blocks)
    return posterior.score(_preference_rows(dataset, store, hashes, config)[0])


def serve_training() -> None:
    """Answer jobs until the input ends: the process that trains."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    logging.getLogger("mirip_fast").addHandler(logging.NullHandler())
    logging.getLogger("mirip_fast").propagate = False
    if hasattr(os, "nice"):
        os.nice(5)  # the page comes first
    for line in sys.stdin:
        print(json.dumps(answer_job(json.loads(line))), file=answers, flush=True)


def answer_job(job: dict[str, Any]) -> dict[str, Any]:
    """One job of :class:`Retrainer`: ``scores``, or the ``error`` why there are none."""
    try:
        hashes = [bytes.fromhex(sha) for sha in job["hashes"]]
        scores = train_once(config_from_dict(job["config"]), Path(job["source"]), hashes)
        return {"scores": scores.astype(float).tolist()}
    except (MiripError, OSError) as error:
        return {"error": str(error)}
    except Exception as error:  # a fault of the program: the session goes on without a head
        return {"error": f"{type(error).__name__}: {error}"}
