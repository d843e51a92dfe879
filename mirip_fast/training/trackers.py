"""Reporting a run to wandb or TensorBoard. A tracker that fails is told once and never stops a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirip_fast.config import TrackingConfig
from mirip_fast.errors import ConfigError
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)

#: Pictures that name works or groups, or show them, by the ends of their names.
_NAMING = ("_mistakes", "_groups", "_within")

TRACKERS = ("wandb", "tensorboard")


class Trackers:
    """All trackers of a run behind one face; each one's failures are its own.

    Args:
        trackers: name → an object with the methods of this class.
    """

    def __init__(self, trackers: Mapping[str, Any]):
        self._trackers = dict(trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report the values of one epoch to every tracker that still works."""
        self._each(lambda tracker: tracker.log(values, step))

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def show(self, pictures: Sequence[Path], mistakes: Sequence[Mapping[str, Any]]) -> None:
        """Report what a finished run left to look at.

        Args:
            pictures: PNG files; their names say what they show.
            mistakes: rows of a table of the worst mistakes: text, numbers, and thumbnails as PIL images.
        """
        self._each(lambda tracker: tracker.show(pictures, mistakes))

    def finish(self, best_model: Path | None) -> None:
        """End every report."""
        self._each(lambda tracker: tracker.finish(best_model))

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever it is, it must not cost the run
                log.warning("%s failed and is left out from here on: %s", name, error)
                del self._trackers[name]


def parse_report_to(text: str) -> list[str]:
    """``wandb,tensorboard`` → names.

    Raises:
        ConfigError: a tracker that does not exist.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"--report-to {', '.join(unknown)}: use {', '.join(TRACKERS)} or none")
    return names


def start_trackers(config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any]) -> Trackers:
    """Start what ``--report-to`` names; one that cannot start is told and left out.

    Args:
        config: which trackers, and their settings.
        run_dir: the run's folder; its name is the default run name.
        settings: the whole resolved configuration, reported with the run.
    """
    makers: dict[str, Callable[[], Any]] = {
        "wandb": lambda: WandbTracker(config, run_dir, settings),
        "tensorboard": lambda: TensorBoardTracker(run_dir, settings),
    }
    started: dict[str, Any] = {}
    for name in parse_report_to(config.report_to):
        try:
            started[name] = makers[name]()
        except Exception as error:
            log.warning("%s cannot be used, the run goes on without it: %s", name, error)
    return Trackers(started)


class WandbTracker:
    """Weights & Biases; ``WANDB_MODE=offline`` keeps the report in the run's folder."""

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any]):
        import wandb

        title = Run(run_dir).title
        tags: Sequence[str] = [tag.strip() for tag in config.wandb_tags.split(",") if tag.strip()]
        self._wandb = wandb
        self._log_model = config.wandb_log_model
        self._pictures = config.wandb_pictures
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or title,
            id=title,
            resume="allow",  # a resumed run goes on in the same report
            entity=config.wandb_entity,
            tags=tags,
            notes=config.wandb_notes or None,
            config=dict(settings),
            dir=str(run_dir),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report the values of one epoch."""
        self._run.log(dict(values), step=step)

    def show(self, pictures: Sequence[Path], mistakes: Sequence[Mapping[str, Any]]) -> None:
        """Report pictures, and where asked for the worst mistakes as a table with the works in it."""
        if not self._pictures:
            pictures = [path for path in pictures if not path.stem.endswith(_NAMING)]
            if mistakes:
                log.info("The worst mistakes stay here: --wandb-pictures sends them to wandb, too")
            mistakes = ()
        shown: dict[str, Any] = {path.stem: self._wandb.Image(str(path)) for path in pictures}
        if mistakes:
            table = self._wandb.Table(columns=[*mistakes[0]])
            for row in mistakes:
                cells = [
                    self._wandb.Image(v) if hasattr(v, "getbands") else v for v in row.values()
                ]
                table.add_data(*cells)
            shown["worst mistakes"] = table
        self._run.log(shown)

    def finish(self, best_model: Path | None) -> None:
        """Send the best model where asked for, and end the report."""
        if self._log_model and best_model is not None:
            artifact = self._wandb.Artifact(f"{self._run.id}-best", type="model")
            artifact.add_file(str(best_model))
            self._run.log_artifact(artifact)
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run's folder."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("TensorBoard is not installed: pip install tensorboard") from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", f"```\n{settings}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report the values of one epoch."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, pictures: Sequence[Path], mistakes: Sequence[Mapping[str, Any]]) -> None:
        """Report pictures, and the worst mistakes as a table of text."""
        import numpy as np
        from PIL import Image

        for path in pictures:
            with Image.open(path) as picture:  # drawn by ourselves
                self._writer.add_image(
                    path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC"
                )
        rows = [{k: v for k, v in row.items() if not hasattr(v, "getbands")} for row in mistakes]
        if rows:
            lines = [
                [*rows[0]],
                ["---"] * len(rows[0]),
                *([str(v) for v in r.values()] for r in rows),
            ]
            text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            self._writer.add_text("worst mistakes", text)
        self._writer.flush()

    def finish(self, best_model: Path | None) -> None:
        """Close the event file."""
        self._writer.close()
