"""Batch size, learning rate and epochs by the size of the training split."""

from __future__ import annotations

from dataclasses import dataclass

from mirip_fast.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """How fast a head learns: the three numbers that belong together."""

    batch_size: int  # images with all pairs, else pairs
    learning_rate: float
    epochs: int


#: The classic recipe, in drawn pairs per batch: (training images below, values).
SAMPLED = (
    (1_000, Preset(16, 5e-5, 200)),
    (10_000, Preset(32, 1e-4, 100)),
    (100_000, Preset(64, 2e-4, 50)),
    (None, Preset(128, 3e-4, 30)),
)

#: The same for all pairs, in images per batch; measured below 10,000 images, see docs/benchmarks.md.
ALL_PAIRS = (
    (300, Preset(32, 1e-4, 200)),
    (1_000, Preset(64, 1e-3, 20)),
    (4_000, Preset(64, 2e-4, 100)),
    (10_000, Preset(512, 1e-3, 100)),
    (100_000, Preset(128, 3e-4, 50)),
    (None, Preset(256, 3e-4, 30)),
)

#: Without a preset.
PLAIN = Preset(32, 1e-4, 100)

#: Patience in epochs, and the steps that it should be worth at least: ten epochs of a hundred images are
#: some thirty steps, in which validation accuracy is still mostly chance.
PATIENCE, PATIENCE_STEPS = 10, 300


def choose_patience(config: TrainConfig, steps_per_epoch: int) -> int:
    """Epochs to wait for a better one: as given, else 10 epochs or 300 steps, whichever is longer."""
    if config.early_stopping_patience is not None:
        return config.early_stopping_patience
    return max(PATIENCE, -(-PATIENCE_STEPS // steps_per_epoch))


def choose_preset(config: TrainConfig, n_train: int) -> Preset:
    """The given values, completed by the preset for ``n_train`` training images or judged pairs."""
    table = ALL_PAIRS if config.pairs == "all" else SAMPLED
    preset = next(row for below, row in table if below is None or n_train < below)
    if config.preset == "none":
        preset = PLAIN
    return Preset(
        batch_size=config.batch_size or preset.batch_size,
        learning_rate=preset.learning_rate
        if config.learning_rate is None
        else config.learning_rate,
        epochs=config.epochs or preset.epochs,
    )
