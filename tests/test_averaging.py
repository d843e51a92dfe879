"""Averages of weights: against plain formulas, in the checkpoints, and after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fit import equal, history, rows, run_in, settings, weights

from mirip_fast.errors import ConfigError
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.ranking import fit as fit_module
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.training.optim import Averaging, Preset, check_averaging
from mirip_fast.training.trackers import Trackers

CPU = torch.device("cpu")
PRESET = Preset(batch_size=16, learning_rate=3e-3, epochs=6)


@pytest.fixture(autouse=True)
def _save_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_SAVE_SECONDS", 0.0)


def make(**options: object) -> HeadFit:
    config = settings(save_every_n_epochs=1, **options)
    return HeadFit(rows(noise=2), rows(24, seed=1, noise=2), config, PRESET, {}, CPU)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def followed(fit: HeadFit) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The trained weights after every step and after every epoch, kept while the fit runs."""
    steps: list[dict[str, torch.Tensor]] = []
    epochs: list[dict[str, torch.Tensor]] = []
    after_step, after_epoch = fit.averaging.after_step, fit.averaging.after_epoch

    def on_step() -> None:
        steps.append(state(fit.head))
        after_step()

    def on_epoch(epoch: int) -> None:
        epochs.append(state(fit.head))
        after_epoch(epoch)

    fit.averaging.after_step = on_step  # type: ignore[method-assign]
    fit.averaging.after_epoch = on_epoch  # type: ignore[method-assign]
    return steps, epochs


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-7)


def test_ema_is_kept_judged_and_saved(tmp_path: Path) -> None:
    fit = make(ema_decay=0.7)
    steps, epochs = followed(fit)
    fit.run(run_in(tmp_path), Trackers({}))
    average = {name: value.double() for name, value in steps[0].items()}
    for step in steps[1:]:
        average = {name: 0.7 * average[name] + 0.3 * step[name].double() for name in average}
    assert len(steps) == 6 * fit.steps_per_epoch
    assert_close(weights(tmp_path / "last_model.pt"), average)
    assert not equal(weights(tmp_path / "last_model.pt"), epochs[-1])
    assert_judged(fit, tmp_path)


def test_swa_is_the_mean_of_the_last_epochs(tmp_path: Path) -> None:
    fit = make(swa_start=4, learning_rate=None)
    _, epochs = followed(fit)
    fit.run(run_in(tmp_path), Trackers({}))
    assert equal(weights(tmp_path / "checkpoint_epoch_3.pt"), epochs[2])
    for last in (4, 5, 6):
        mean = {n: sum(e[n].double() for e in epochs[3:last]) / (last - 3) for n in epochs[0]}
        assert_close(weights(tmp_path / f"checkpoint_epoch_{last}.pt"), mean)  # type: ignore[arg-type]
    rates = [float(line["learning_rate"]) for line in history(tmp_path)]
    assert rates[0] > rates[1] > rates[2] == rates[3] == rates[4] == rates[5] > 0
    assert_judged(fit, tmp_path)


def assert_judged(fit: HeadFit, folder: Path) -> None:
    """The history's accuracies and the best epoch are those of the saved weights."""
    lines = history(folder)
    for line in lines:
        fit.head.load_state_dict(weights(folder / f"checkpoint_epoch_{line['epoch']}.pt"))
        loss, accuracy, _ = fit.objective.judge(fit.head, fit.val)
        assert (float(line["val/loss"]), float(line["val/accuracy"])) == (loss, accuracy)
    best = load_checkpoint(folder / "best_model.pt")
    accuracies = [float(line["val/accuracy"]) for line in lines]
    assert best["epoch"] == 1 + int(np.argmax(accuracies)) and len(set(accuracies)) > 1
    chosen = weights(folder / f"checkpoint_epoch_{best['epoch']}.pt")
    assert equal(best["model_state_dict"], chosen)


def test_patience_begins_where_the_mean_does(tmp_path: Path) -> None:
    config = settings(early_stopping_patience=2, swa_start=12, save_every_n_epochs=0)
    preset = Preset(60, 1e-9, 30)  # nothing is learned, so nothing gets better
    fit = HeadFit(rows(), rows(24, seed=1), config, preset, {}, CPU)
    result = fit.run(run_in(tmp_path), Trackers({}))
    assert result["stopped_early"] and result["epochs"] == 14


def test_what_can_not_work_is_refused() -> None:
    train = settings().train
    check_averaging(train, 5)
    train.swa_start = 6
    check_averaging(train, 6)
    with pytest.raises(ConfigError, match="--swa-start 6: there are 5 epochs at most"):
        check_averaging(train, 5)
    with pytest.raises(ConfigError, match="choose one"):
        Averaging(torch.nn.Identity(), ema_decay=0.9, swa_start=1)
