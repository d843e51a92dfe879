"""The training loop: what it learns, what it writes down, and that interruptions change nothing."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from mirip_fast.config import Config
from mirip_fast.errors import CheckpointError, TrainingError
from mirip_fast.models.checkpoint import load_checkpoint, save_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking import fit as fit_module
from mirip_fast.ranking import objective
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.optim import Preset
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

CPU = torch.device("cpu")


def rows(
    n: int = 60, *, seed: int = 0, views: int = 1, noise: float = 1.0, within: bool = False
) -> Rows:
    """Features of 6 numbers, the first two of which tell the tier; more so, the less noise."""
    rng = np.random.default_rng(seed)
    tiers = rng.permutation(np.arange(n) % 4).astype(np.int64)
    features = rng.standard_normal((n, views, 6)) * noise
    features[:, :, 0] += 1.5 - tiers[:, None]
    features[:, :, 1] -= 1.5 - tiers[:, None]
    codes = (np.arange(n) % 3).astype(np.int64) if within else None
    ids = [str(i) for i in range(n)]
    return Rows(ids, features.astype(np.float32), tiers, [None] * n, codes)


def settings(**train: object) -> Config:
    config = Config()
    head, learning = config.head, config.train
    head.projector_hidden_dim, head.projector_output_dim, head.score_hidden_dim = 12, 8, 6
    learning.early_stopping_patience, learning.save_total_limit = 0, 1000
    for name, value in train.items():
        setattr(learning, name, value)
    return config


@pytest.fixture(autouse=True)
def _save_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_SAVE_SECONDS", 0.0)


PRESET = Preset(batch_size=16, learning_rate=3e-3, epochs=6)


def make(
    config: Config | None = None,
    *,
    preset: Preset = PRESET,
    train: Rows | None = None,
    val: Rows | None = None,
) -> HeadFit:
    train = rows() if train is None else train
    val = rows(24, seed=1) if val is None else val
    return HeadFit(train, val, config or settings(), preset, {"some": "info"}, CPU)


def run_in(folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(path)["model_state_dict"])


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def history(folder: Path, *, seconds: bool = False) -> list[dict[str, str]]:
    with (folder / "history.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    if not seconds:
        for line in lines:
            del line["epoch_seconds"]
    return lines


def head_of(path: Path) -> RankingHead:
    head = RankingHead(6, settings().head).eval()
    head.load_state_dict(weights(path))
    return head


def accuracy_and_loss(head: RankingHead, data: Rows) -> tuple[float, float]:
    """Pairwise accuracy and margin loss, pair by pair in double precision."""
    with torch.no_grad():
        scores = [head(torch.from_numpy(views)).double().mean().item() for views in data.features]
    right, losses = [], []
    for i, j in itertools.product(range(len(data)), repeat=2):
        fair = data.within is None or data.within[i] == data.within[j]
        if data.tiers[i] < data.tiers[j] and fair:
            gap = scores[i] - scores[j]
            right.append(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
            losses.append(max(0.0, 1.0 - gap))
    return float(np.mean(right)), float(np.mean(losses))


@pytest.mark.parametrize("pairs", ["all", "sampled"])
@pytest.mark.parametrize("loss", ["margin", "logistic"])
def test_it_learns_what_can_be_learned(tmp_path: Path, pairs: str, loss: str) -> None:
    fit = make(
        settings(pairs=pairs, loss=loss),
        preset=Preset(16, 1e-2, 15),
        train=rows(noise=0.1),
        val=rows(24, seed=1, noise=0.1),
    )
    result = fit.run(run_in(tmp_path), Trackers({}))
    lines = history(tmp_path)
    assert result["val_pairwise_accuracy"] == 1.0 and float(lines[-1]["train/accuracy"]) == 1.0
    assert float(lines[-1]["train/loss"]) < 0.7 * float(lines[0]["train/loss"])
    assert (result["epochs"], result["stopped_early"]) == (15, False)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("within", [False, True])
def test_the_history_is_that_of_the_saved_weights(tmp_path: Path, views: int, within: bool) -> None:
    train = rows(views=views, noise=2, within=within)
    val = rows(24, seed=1, views=views, noise=2, within=within)
    result = make(settings(save_every_n_epochs=1), train=train, val=val).run(
        run_in(tmp_path), Trackers({})
    )
    lines = history(tmp_path)
    assert [line["epoch"] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    for line in lines:
        head = head_of(tmp_path / f"checkpoint_epoch_{line['epoch']}.pt")
        accuracy, loss = accuracy_and_loss(head, val)
        assert float(line["val/accuracy"]) == pytest.approx(accuracy, abs=1e-12)
        assert float(line["val/loss"]) == pytest.approx(loss, abs=1e-5)
        assert float(line["train/accuracy"]) == pytest.approx(accuracy_and_loss(head, train)[0])
    accuracies = [float(line["val/accuracy"]) for line in lines]
    assert len(set(accuracies)) > 1, "nothing to choose from"
    assert result["val_pairwise_accuracy"] == max(accuracies)
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    best = load_checkpoint(tmp_path / "best_model.pt")
    assert (best["epoch"], best["best_accuracy"]) == (
        result["best_epoch"],
        result["val_pairwise_accuracy"],
    )
    chosen = tmp_path / f"checkpoint_epoch_{result['best_epoch']}.pt"
    assert equal(weights(tmp_path / "best_model.pt"), weights(chosen))
    assert equal(weights(tmp_path / "last_model.pt"), weights(tmp_path / "checkpoint_epoch_6.pt"))


def test_the_training_loss_is_that_of_the_batches(tmp_path: Path) -> None:
    config = settings()
    config.head.projector_dropout = 0.0
    # One batch of everything and no step that changes anything: the loss over all pairs.
    fit = make(config, preset=Preset(1000, 0.0, 1))
    expected = accuracy_and_loss(fit.head.eval(), rows())[1]
    fit.run(run_in(tmp_path), Trackers({}))
    assert float(history(tmp_path)[0]["train/loss"]) == pytest.approx(expected, abs=1e-5)


class StopError(Exception):
    pass


def stopping_at(number: int) -> Callable[[Path, dict[str, object]], None]:
    """A save_checkpoint that fails from its call of this number on."""
    saves = itertools.count()

    def save(path: Path, checkpoint: dict[str, object]) -> None:
        if next(saves) >= number:  # nor is there time to save at the end
            raise StopError
        save_checkpoint(path, checkpoint)

    return save


def go_on(run: Run, config: Config, preset: Preset, data: tuple[Rows, Rows]) -> dict[str, object]:
    """What resuming does."""
    checkpoint = load_checkpoint(run.last)
    run.truncate_history(int(checkpoint["epoch"]))
    fit = HeadFit(*data, config, preset, {}, CPU)
    fit.resume(checkpoint)
    return fit.run(run, Trackers({}))


@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_an_interruption_at_any_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str
) -> None:
    config = settings(pairs=pairs, save_every_n_epochs=2, early_stopping_patience=4)
    config.head.projector_dropout = 0.3
    within = pairs == "all"
    data = tuple(rows(n, seed=n, views=2, noise=2, within=within) for n in (60, 24))
    whole = run_in(tmp_path / "whole")
    saves = itertools.count()

    def counted(path: Path, checkpoint: dict[str, object]) -> None:
        next(saves)
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(fit_module, "save_checkpoint", counted)
    expected = HeadFit(*data, config, PRESET, {}, CPU).run(whole, Trackers({}))
    total = next(saves)
    resumed = 0
    for stop_at in range(total):
        run = run_in(tmp_path / str(stop_at))
        monkeypatch.setattr(fit_module, "save_checkpoint", stopping_at(stop_at))
        with pytest.raises(StopError):
            HeadFit(*data, config, PRESET, {}, CPU).run(run, Trackers({}))
        if not run.last.exists():
            continue  # in the first epoch: there is nothing to go on from
        resumed += 1
        monkeypatch.setattr(fit_module, "save_checkpoint", save_checkpoint)
        result = go_on(run, config, PRESET, data)
        assert result["best_epoch"] == expected["best_epoch"]
        assert (result["epochs"], result["stopped_early"]) == (
            expected["epochs"],
            expected["stopped_early"],
        )
        assert history(run.path) == history(whole.path)
        for path in whole.path.glob("*.pt"):
            assert equal(weights(path), weights(run.path / path.name)), path.name
    assert resumed >= total - 3


def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path) -> None:
    make().run(run_in(tmp_path), Trackers({}))
    checkpoint = load_checkpoint(tmp_path / "last_model.pt")
    wide = settings()
    wide.head.score_hidden_dim = 7
    with pytest.raises(CheckpointError, match="does not fit"):
        make(wide).resume(checkpoint)
    del checkpoint["training_state"]
    with pytest.raises(CheckpointError, match="training_state"):
        make().resume(checkpoint)


def test_early_stopping_ends_with_the_best_epoch(tmp_path: Path) -> None:
    config = settings(early_stopping_patience=3, save_every_n_epochs=1)
    data = rows(noise=3), rows(24, seed=1, noise=3)
    fit = HeadFit(*data, config, Preset(16, 3e-3, 60), {}, CPU)
    result = fit.run(run_in(tmp_path), Trackers({}))
    accuracies = [float(line["val/accuracy"]) for line in history(tmp_path)]
    assert (
        result["stopped_early"]
        and result["epochs"] == len(accuracies) == result["best_epoch"] + 3 < 60
    )
    assert accuracies.index(max(accuracies)) + 1 == result["best_epoch"]
    chosen = tmp_path / f"checkpoint_epoch_{result['best_epoch']}.pt"
    assert equal(weights(tmp_path / "best_model.pt"), weights(chosen))


def test_numbered_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    config = settings(save_every_n_epochs=3, save_total_limit=2)
    make(config, preset=Preset(60, 1e-3, 13)).run(run_in(tmp_path), Trackers({}))
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {
        "checkpoint_epoch_9.pt", "checkpoint_epoch_12.pt", "best_model.pt", "last_model.pt",
    }  # fmt: skip
    checkpoint = torch.load(tmp_path / "checkpoint_epoch_9.pt", weights_only=True)
    assert checkpoint["epoch"] == 9 and checkpoint["config"] == config.to_dict()
    assert checkpoint["model"] == {"some": "info"}
    make(settings(save_every_n_epochs=0)).run(run_in(tmp_path / "none"), Trackers({}))
    assert {path.name for path in (tmp_path / "none").glob("*.pt")} == {
        "best_model.pt", "last_model.pt",
    }  # fmt: skip


def spoil(head: RankingHead) -> None:
    with torch.no_grad():
        next(head.parameters()).fill_(math.nan)


def assert_sound(folder: Path) -> None:
    for name in ("best_model.pt", "last_model.pt"):
        assert all(value.isfinite().all() for value in weights(folder / name).values()), name


def test_weights_spoiled_by_the_last_step_of_an_epoch_are_not_saved(tmp_path: Path) -> None:
    fit = make()
    train_epoch = fit._train_epoch

    def spoiled(epoch: int) -> float:
        loss = train_epoch(epoch)
        if epoch == 2:
            spoil(fit.head)
        return loss

    fit._train_epoch = spoiled  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="epoch 2"):
        fit.run(run_in(tmp_path), Trackers({}))
    assert_sound(tmp_path)
    assert load_checkpoint(tmp_path / "last_model.pt")["epoch"] == 1
    assert len(history(tmp_path)) == 1


@pytest.mark.parametrize("pairs", ["all", "sampled"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(16, 1), (7, 3), (60, 1), (5, 100)])
def test_the_learning_rate_ends_where_it_should(
    tmp_path: Path, pairs: str, batch_size: int, accumulate: int
) -> None:
    config = settings(pairs=pairs, gradient_accumulation_steps=accumulate, scheduler_eta_min=1e-5)
    fit = make(config, preset=Preset(batch_size, 1e-3, 3))
    fit.run(run_in(tmp_path), Trackers({}))
    rates = [float(line["learning_rate"]) for line in history(tmp_path)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(1e-5)
    assert fit.scheduler.last_epoch == 3 * fit.steps_per_epoch


@pytest.mark.parametrize("accumulate", [2, 4, 5])
def test_accumulated_batches_equal_one_large_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    data = rows(80), rows(24, seed=1)
    fixed = objective.draw_partners(-data[0].tiers, None, np.random.default_rng(1))
    monkeypatch.setattr(objective, "draw_partners", lambda *_: fixed)
    states = []
    # Ten batches of 8 pairs: with 4 at a time, two are left for the last step.
    for name, batch_size, steps in (("large", 8 * accumulate, 1), ("small", 8, accumulate)):
        config = settings(pairs="sampled", gradient_accumulation_steps=steps)
        config.head.projector_dropout = 0.0
        fit = HeadFit(*data, config, Preset(batch_size, 1e-3, 2), {}, CPU)
        if name == "large":  # the same division: all full but the last
            cuts = range(8 * accumulate, 80, 8 * accumulate)
            whole = np.split(fixed, list(cuts))
            fit.objective.batches = lambda size, rng, whole=whole: whole  # type: ignore[method-assign, misc]
        fit.run(run_in(tmp_path / name), Trackers({}))
        states.append(weights(tmp_path / name / "last_model.pt"))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-5)


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make().run(run_in(tmp_path), Trackers({}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
