"""`label` as a whole: from a folder to a session that a browser can open."""

from __future__ import annotations

import getpass
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.closing import Closing
from mirip_fast.config import Config, LabelConfig
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.pair_files import read_pairs
from mirip_fast.data.splits import SPLITS
from mirip_fast.errors import CheckpointError, MiripError, RunNotFoundError
from mirip_fast.features.embed import Progress
from mirip_fast.files import remove_abandoned_folders
from mirip_fast.label.choice import Chooser, Shares
from mirip_fast.label.figures import Share, consistency, predicted
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.judgements import Judgement, from_file
from mirip_fast.label.pictures import Pictures
from mirip_fast.label.retrain import Retrainer
from mirip_fast.label.retrain_process import training_config
from mirip_fast.label.server import LabelServer
from mirip_fast.label.session import Session
from mirip_fast.label.works import Works, prepare_works
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.settings import Resolved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """What a session leaves behind.

    Attributes:
        made: judgements of this session.
        judged: all judgements of the file.
        file: where they are.
        accuracy: of the predictions of random pairs.
        consistency: of the judge.
        next_command: what to type to train on them.
    """

    made: int
    judged: int
    file: Path
    accuracy: Share
    consistency: Share
    next_command: str


class LabelRun(Closing):
    """A session with its server, ready to run; closing it lets go of the file.

    Args:
        works: what is judged.
        out: the file of judgements; an existing one is gone on from.
        config: the settings.
        model: a model that is there already: it predicts until one is trained.
        port: where to listen; 0 takes a free one.

    Raises:
        DataError: the file is in use, foreign or faulty.
        ConfigError: the port is taken.
    """

    def __init__(
        self, works: Works, out: Path, config: Config, model: ScoreModel | None, port: int = 0
    ):
        self._works, self._config = works, config
        self.file = JudgementFile(out.absolute())
        self.session: Session | None = None
        try:
            if self.file.mended:
                log.warning("%s", self.file.mended)
            judged = judgements_of(works, self.file)
            self.session = _session(works, self.file, judged, config, model)
            self.server = LabelServer(self.session, Pictures(works), port)
            self.session.train_with(
                Retrainer(
                    training_config(config, self.file.path),
                    works.dataset.source,
                    works.images.hashes,
                    self.session.retrained,
                )
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop what goes on in the background and let go of the file."""
        if self.session is not None:
            self.session.close()
        self.file.close()

    def ended(self) -> Ended:
        """What came of it so far."""
        assert self.session is not None
        judged = self.session.judgements
        hits = predicted(judged, measure=True)
        return Ended(
            made=self.session.made_now,
            judged=len(judged),
            file=self.file.path,
            accuracy=Share(sum(hit for _, hit in hits), len(hits)),
            consistency=consistency(judged),
            next_command=training_command(self._works, self.file.path, self._config),
        )


def open_label(
    folder: Path,
    out: Path,
    resolved: Resolved,
    *,
    checkpoint: Path | None = None,
    port: int = 0,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> LabelRun:
    """Embed what is missing, read what was judged before, and get a session ready.

    Args:
        folder: folder of images or CSV file, with grades or without.
        out: the file of judgements.
        resolved: the settings, and which of them were given.
        checkpoint: run whose model predicts at first; None for the newest one that fits.
        port: where to listen; 0 takes a free one.
        command: what is running, for whoever finds the store locked.
        progress: called while images are embedded.

    Raises:
        MiripError: the works, the file or the port can not be used; says why.
    """
    remove_abandoned_folders()  # of servers that were killed while a head was trained
    works = prepare_works(folder, resolved, command=command, progress=progress)
    sizes = ", ".join(f"{split} {len(works.in_split(split))}" for split in SPLITS)
    log.info("%s to judge (%s)", counted(int(works.shown.sum()), "work"), sizes)
    model = _model(works, checkpoint, Path(resolved.config.train.output_dir))
    return LabelRun(works, out, resolved.config, model, port)


def judgements_of(works: Works, file: JudgementFile) -> list[Judgement]:
    """What was judged before.

    Raises:
        DataError: rows that are faulty or about other images.
    """
    if not file.has_rows:
        return []
    manifest = works.images.manifest
    records = [*manifest.records, *works.others]
    found = from_file(read_pairs([file.path], records, [*manifest.places, manifest.root]))
    n = len(works)
    judged = [j for j in found if j.pair.one < n and j.pair.other < n]
    log.info("%s: going on after %s", shown(file.path), counted(len(found), "judgement"))
    return judged


def training_command(works: Works, pairs: Path, config: Config) -> str:
    """What to type to train on the judgements, with the split that the session had."""
    words = ["mirip-fast", "train", "--head-only", "--pairs", shown(pairs)]
    words += ["--data", shown(works.dataset.source)]
    plain = Config()
    for name in ("train_ratio", "val_ratio", "test_ratio", "split_seed", "near_groups"):
        value = getattr(config.split, name)
        if value != getattr(plain.split, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if config.embed.cache_dir != plain.embed.cache_dir:
        words += ["--cache-dir", config.embed.cache_dir]
    return shlex.join(words)


def _session(
    works: Works,
    file: JudgementFile,
    judged: list[Judgement],
    config: Config,
    model: ScoreModel | None,
) -> Session:
    label: LabelConfig = config.label
    scores: NDArray[np.floating] | None = None
    if model is not None:
        scores = model.score(works.store, works.images.hashes)
    seed = config.train.seed
    chooser = Chooser(
        {split: works.in_split(split) for split in SPLITS},
        works.features,
        works.blocks,
        Shares(label.measure_share, label.repeat_share, label.choose == "informative"),
        # Another session draws other pairs, and the same one again where nothing was judged.
        seed=seed + len(judged),
    )
    return Session(
        file,
        works.name,
        chooser,
        judged,
        judge=label.judge or _login(),
        retrain_every=label.retrain_every,
        start=scores,
    )


def _model(works: Works, checkpoint: Path | None, output_dir: Path) -> ScoreModel | None:
    """The model to begin with; one that was not asked for need not be there, nor fit."""
    try:
        model = pick_model(checkpoint, output_dir)
        model.require_one_backbone("label")
        if model.info.fingerprint != works.store.fingerprint:
            raise CheckpointError(
                f"{model.checkpoint} looks at other features than those of {shown(works.store.path)}"
            )
        model.score(works.store, works.images.hashes[:1])  # all its views and kinds are there
        return model
    except RunNotFoundError:
        if checkpoint is not None:
            raise
    except MiripError as error:
        if checkpoint is not None:
            raise
        log.info("Beginning without a model: %s", error)
    return None


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in a container
        return "judge"
