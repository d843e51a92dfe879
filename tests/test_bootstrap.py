"""Bootstrap heads: what they are drawn from, and that their scores are in the unit of the model's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mirip_fast_cli.main import run
from test_cli import TINY, make_data

from mirip_fast.errors import DataError, TrainingError
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking import bootstrap
from mirip_fast.ranking.bootstrap import bootstrap_preset, draw_resample, write_bootstrap
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.fold_plan import load_plan
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.head_files import load_bootstrap
from mirip_fast.ranking.head_tasks import HeadTask, TrainedHead
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.run_folder import Run

TIERS = ("S", "A", "B", "C")


def test_a_resample_draws_as_many_units_as_there_are_with_all_their_images() -> None:
    units = np.array([0, 1, 1, 2, 3, 3, 3, 4])
    tiers = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    times = np.zeros(5)
    for seed in range(400):
        index = draw_resample(units, tiers, np.random.default_rng(seed))
        drawn = np.bincount(index, minlength=8)
        for unit in range(5):
            assert len(set(drawn[units == unit].tolist())) == 1, "a unit is drawn as a whole"
        of_unit = np.array([drawn[units == unit][0] for unit in range(5)])
        assert of_unit.sum() == 5
        times += of_unit
    np.testing.assert_allclose(times / 400, 1, atol=0.15)


def test_a_resample_without_a_pair_is_drawn_again() -> None:
    units, tiers = np.arange(6), np.array([0, 0, 0, 0, 0, 1])
    for seed in range(100):
        index = draw_resample(units, tiers, np.random.default_rng(seed))
        assert len(set(tiers[index].tolist())) == 2


@pytest.mark.parametrize("n", [20, 467, 2000, 8000, 100_000])
def test_the_pace_is_some_hundred_steps_in_whole_passes(n: int) -> None:
    preset = bootstrap_preset(n)
    steps = preset.epochs * -(-n // preset.batch_size)
    assert preset.epochs == 1 or steps <= 2 * bootstrap.STEPS
    assert preset.epochs == bootstrap.EPOCHS or steps >= bootstrap.STEPS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain run and one of folds, both with bootstrap heads."""
    folder = tmp_path_factory.mktemp("bootstrap")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_data(folder / "data", 48)
        assert run(["embed", "data", "--tta", "flip", *TINY]) == 0
        train = ["train", "--head-only", "--epochs", "6", "--bootstrap", "7"]
        assert run([*train, "--output-dir", "plain"]) == 0
        assert run([*train, "--output-dir", "folds", "--folds", "3"]) == 0
    return folder


@pytest.mark.parametrize("kind", ["plain", "folds"])
def test_scores_are_in_the_unit_of_the_models_own(
    trained: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    model = pick_model(None, trained / kind)
    folder = model.checkpoint.parent
    store = FeatureStore.open(newest_graded(trained / "cache").store_path)
    held_out = load_held_out(folder, TIERS)
    assert held_out is not None
    images = load_split(folder / "split.csv", TIERS, newest_config(folder).data)
    place = {record.image_id: i for i, record in enumerate(images.manifest.records)}
    hashes = [images.hashes[place[image_id]] for image_id in held_out.ids]
    views = model.score_bootstrap(store, hashes)
    assert views is not None and views.shape == (7, len(hashes), 2)
    assert len(np.unique(views.round(4), axis=0)) == 7
    scores = views.astype(np.float64).mean(2)
    if kind == "plain":  # no resample has a validation image
        np.testing.assert_allclose(scores.mean(1), held_out.scores.mean(), atol=1e-2)
        np.testing.assert_allclose(scores.std(1), held_out.scores.std(), rtol=1e-2)
    else:  # each head is lined up on the images that its resample has not
        np.testing.assert_allclose(scores.mean(1), held_out.scores.mean(), atol=0.5)
        np.testing.assert_allclose(scores.std(1), held_out.scores.std(), rtol=0.5)


def newest_config(folder: Path):  # type: ignore[no-untyped-def]
    from mirip_fast.settings import resolve

    return resolve((folder / "config.yaml",)).config


class Caught(Exception):
    """Ends a training that was only to be looked at."""


def test_heads_learn_from_resampled_training_images_only(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given to the training: resamples of the right images, each with a seed of its own."""
    seen: list[tuple[Rows, list[HeadTask]]] = []

    def caught(rows: Rows, tasks: list[HeadTask], device: object) -> list[TrainedHead]:
        seen.append((rows, tasks))
        raise Caught

    monkeypatch.chdir(trained)
    monkeypatch.setattr(bootstrap, "train_heads", caught)
    (folder,) = (trained / "folds").iterdir()
    plan = load_plan(Run(folder))
    store = FeatureStore.open(Path(plan.config.embed.cache_dir) / plan.info.fingerprint_id)
    for learned in (("train",), ("train", "val")):
        with pytest.raises(Caught):
            write_bootstrap(Run(folder), plan.images, learned, plan.config, plan.info, store)
    for (rows, tasks), learned in zip(seen, (("train",), ("train", "val")), strict=True):
        records = plan.images.manifest.records
        allowed = {
            r.image_id for r, s in zip(records, plan.images.splits, strict=True) if s in learned
        }
        assert len(tasks) == 7 and len({task.config.train.seed for task in tasks}) == 7
        resamples = {tuple(sorted(task.train.tolist())) for task in tasks}
        assert len(resamples) == 7
        for task in tasks:
            assert {rows.ids[i] for i in task.train} <= allowed
            assert len(task.train) == len(allowed) and not len(task.val)
        shares = [len(set(task.train.tolist())) / len(allowed) for task in tasks]
        assert 0.55 < np.mean(shares) < 0.72  # 1 − 1/e


def test_what_can_not_be_is_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (folder,) = (trained / "folds").iterdir()
    plan = load_plan(Run(folder))
    store = FeatureStore.open(Path(plan.config.embed.cache_dir) / plan.info.fingerprint_id)
    arrays = dict.fromkeys(["a"], np.zeros(1, np.float32))
    broken = TrainedHead(arrays, 1, 1, float("nan"), finite=False)
    monkeypatch.setattr(bootstrap, "train_heads", lambda *_: [broken] * 7)
    with pytest.raises(TrainingError, match="bootstrap head is not finite"):
        write_bootstrap(Run(folder), plan.images, ("train",), plan.config, plan.info, store)
    with pytest.raises(DataError, match="no held-out scores"):
        elsewhere = Run(trained / "nowhere")
        write_bootstrap(elsewhere, plan.images, ("train",), plan.config, plan.info, store)


def test_the_heads_are_no_wider_than_the_runs_own() -> None:
    from mirip_fast.config import Config, HeadConfig

    own = HeadConfig(projector_hidden_dim=32, score_hidden_dim=8)
    narrow = bootstrap.bootstrap_config(dataclasses.replace(Config(), head=own)).head
    assert (narrow.projector_hidden_dim, narrow.projector_output_dim, narrow.score_hidden_dim) == (
        32, 64, 8,
    )  # fmt: skip


@pytest.mark.parametrize("folds", [[], ["--folds", "2"]])
def test_a_finished_run_gets_heads_when_it_is_resumed(
    trained: Path, monkeypatch: pytest.MonkeyPatch, folds: list[str]
) -> None:
    monkeypatch.chdir(trained)
    out = ["--output-dir", "later" + "".join(folds)]
    assert run(["train", "--head-only", "--epochs", "3", *folds, *out]) == 0
    model = pick_model(None, trained / out[1])
    before = model.checkpoint.read_bytes()
    assert load_bootstrap(model.checkpoint) is None
    resume = ["train", "--head-only", "--resume", "latest", *out]
    assert run([*resume, "--bootstrap", "3"]) == 0
    heads = load_bootstrap(model.checkpoint)
    assert heads is not None and len(heads) == 3
    assert model.checkpoint.read_bytes() == before
