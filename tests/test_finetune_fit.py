"""The end-to-end loop: it learns, resumes to the last bit, survives a full memory, keeps averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_models import SIZE, Kept, pictures, prepared, rows_of_tiers

from mirip_fast.config import Config, FinetuneConfig, TrainConfig
from mirip_fast.errors import CheckpointError, PreemptedError, TrainingError
from mirip_fast.finetune.fit import FullFit, Plan
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.training.run_folder import Run

ModelDir = Callable[[str], Path]

IMAGES, TIERS = pictures(36)
PLAN = Plan(epochs=4, batch_size=10, head_epochs=0, patience=0, precision="fp32", size=SIZE)
#: No pair depends on it, so that its gradient is rounding alone, which Adam makes steps of.
FREE = "score_head.layers.3.bias"
TRAIN = {"learning_rate": 1e-3, "save_every_n_epochs": 1, "save_total_limit": 9}


def make_config(train: dict[str, Any] | None = None, **finetune: Any) -> Config:
    settings = {**TRAIN, **(train or {})}
    return Config(train=TrainConfig(**settings), finetune=FinetuneConfig(**finetune))


def make_fit(folder: Path, config: Config, plan: Plan = PLAN) -> FullFit:
    noisy = config.finetune.stochastic_depth > 0
    model, strategy = prepared(folder, config, dropout=0.2 if noisy else 0.0)
    train, val = rows_of_tiers(TIERS[:24]), rows_of_tiers(TIERS[24:])
    pixels = Kept(IMAGES[:24]), Kept(IMAGES[24:])
    return FullFit(model, strategy, train, pixels[0], val, pixels[1], config, plan, {})


def make_run(path: Path) -> Run:
    path.mkdir()
    return Run(path)


def same(first: Path, second: Path) -> None:
    """Two checkpoints hold the same, to the last bit."""

    def compare(a: Any, b: Any, where: str) -> None:
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                if key not in ("seconds", "waited"):
                    compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}[{i}]")
        else:
            assert a == b, where

    compare(load_checkpoint(first), load_checkpoint(second), "checkpoint")


NOISE = {"stochastic_depth": 0.5, "patch_dropout": 0.3, "mixup": 0.4, "cutmix": 1.0, "accumulation_steps": 2}  # fmt: skip
RESUMED = [
    (6, "full", {"ema_decay": 0.9}, NOISE),
    (5, "lora", {"ema_decay": 0.9}, NOISE),
    (4, "gradual", {}, {"unfreeze": "1:0,2:1,3:all", "gradient_checkpointing": True}),
    (7, "last:1", {"swa_start": 2}, NOISE),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "strategy", "train", "finetune"), RESUMED)
def test_stopped_anywhere_and_resumed_equals_uninterrupted(
    model_dir: ModelDir, tmp_path: Path, steps: int, strategy: str, train: dict[str, Any],
    finetune: dict[str, Any],
) -> None:  # fmt: skip
    folder = model_dir("registers")
    config = make_config(train, strategy=strategy, **finetune)
    plan = replace(PLAN, epochs=3)
    whole = make_run(tmp_path / "whole")
    make_fit(folder, config, plan).run(whole)

    stopped = make_run(tmp_path / "stopped")
    fit = make_fit(folder, config, plan)
    step = fit._step
    done = 0

    def counted(*args: Any) -> None:
        nonlocal done
        step(*args)
        done += 1
        if done == steps:
            fit.stop = "SIGTERM"

    fit._step = counted  # type: ignore[method-assign]
    with pytest.raises(PreemptedError, match="SIGTERM"):
        fit.run(stopped)
    again = make_fit(folder, config, plan)
    again.resume(load_checkpoint(stopped.last))
    assert (again.epoch, again.now["steps"]) == (((steps - 1) // 3, (steps - 1) % 3 + 1))
    again.run(stopped)
    for name in (
        "last_model.pt",
        "best_model.pt",
        "checkpoint_epoch_2.pt",
        "checkpoint_epoch_3.pt",
    ):
        same(whole.path / name, stopped.path / name)
    times = {"epoch_seconds", "images_per_second", "data_seconds", "memory_gib"}
    rows = [
        [{k: v for k, v in row.items() if k not in times} for row in run.history()]
        for run in (whole, stopped)
    ]
    assert rows[0] == rows[1]


def test_a_checkpoint_of_another_model_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    make_fit(model_dir("dinov2"), make_config(), replace(PLAN, epochs=1)).run(run)
    for strategy, checkpoint in (("lora", run.last), ("full", run.best)):
        fit = make_fit(model_dir("dinov2"), make_config(strategy=strategy))
        with pytest.raises(CheckpointError, match="does not fit this run"):
            fit.resume(load_checkpoint(checkpoint))


def out_of_memory(images: int, fit: FullFit, *, judging: bool) -> list[int]:
    """From now on, ``fit`` has room for so many images at once; the numbers that it does take."""
    sizes: list[int] = []

    def tight(given: torch.Tensor) -> torch.Tensor:
        if fit.model.training != judging:
            if len(given) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
            sizes.append(len(given))
        return fit.model(given)

    fit.score = tight
    return sizes


@pytest.fixture(scope="module")
def whole(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that had all the memory that it wanted."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run")
    make_fit(model_dir("dinov2"), make_config()).run(run)
    return run


def test_out_of_memory_makes_smaller_micro_batches_of_the_same_batch(
    model_dir: ModelDir, whole: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = make_run(tmp_path / "small")
    fit = make_fit(model_dir("dinov2"), make_config())
    sizes = out_of_memory(3, fit, judging=False)
    with caplog.at_level("WARNING", logger="mirip_fast"):
        fit.run(small)
    assert fit.parts_per_step == 4 and max(sizes) == 2  # of batches of 8
    told = [text for text in caplog.messages if "Out of memory" in text]
    assert len(told) == 2 and "4 micro-batches of at most 3 images" in told[1]
    first, second = (load_checkpoint(run.last)["model_state_dict"] for run in (whole, small))
    for name, value in first.items():
        if name != FREE:
            assert torch.allclose(value, second[name], atol=2e-5), name


def test_out_of_memory_while_judging_makes_smaller_passes(
    model_dir: ModelDir, whole: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = make_run(tmp_path / "small")
    fit = make_fit(model_dir("dinov2"), make_config())
    sizes = out_of_memory(3, fit, judging=True)
    with caplog.at_level("WARNING", logger="mirip_fast"):
        fit.run(small)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line.rpartition("at most ")[2] for line in told] == [
        "5 images are scored at once",
        "3 images are scored at once",
    ]
    assert fit.parts_per_step == 1 and fit.evaluated_at_once == 3
    assert sum(sizes) == 4 * 12  # every image in every epoch, once
    for first, second in zip(whole.history(), small.history(), strict=True):
        for column in ("train/loss", "val/loss", "val/accuracy"):
            assert float(first[column]) == pytest.approx(float(second[column]), rel=1e-5), column
    again = make_fit(model_dir("dinov2"), make_config())
    again.resume(load_checkpoint(small.last))
    assert again.evaluated_at_once == 3


@pytest.mark.parametrize("judging", [False, True])
def test_an_image_that_does_not_fit_alone_ends_the_run_with_advice(
    model_dir: ModelDir, tmp_path: Path, judging: bool
) -> None:
    fit = make_fit(model_dir("dinov2"), make_config())
    out_of_memory(0, fit, judging=judging)
    with pytest.raises(TrainingError, match=r"one image at a time.*--gradient-checkpointing"):
        fit.run(make_run(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rates(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    fit = make_fit(model_dir("dinov2"), make_config())
    fit.score = lambda images: fit.model(images) * float("nan")
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 1.*backbone.*head"):
        fit.run(make_run(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_what_is_judged_and_kept(
    model_dir: ModelDir, tmp_path: Path, kind: str
) -> None:
    train = {"ema_decay": 0.5} if kind == "ema" else {"swa_start": 3}
    run = make_run(tmp_path / "run")
    fit = make_fit(model_dir("dinov2"), make_config(train))
    fit.run(run)
    last = load_checkpoint(run.last)
    raw, kept = last["training_state"]["learning"], last["training_state"][kind]["values"]
    name = "head.score_head.layers.0.weight"
    assert not torch.equal(raw[name], kept[name])
    assert torch.equal(last["model_state_dict"][name.removeprefix("head.")], kept[name])
    if kind == "swa":
        files = [run.path / f"checkpoint_epoch_{epoch}.pt" for epoch in (3, 4)]
        ends = [load_checkpoint(path)["training_state"]["learning"][name] for path in files]
        assert torch.allclose(kept[name], torch.stack(ends).mean(0), atol=1e-7)
        rates = [float(row["learning_rate"]) for row in run.history()]
        assert rates[1] == rates[2] == rates[3]


def test_the_warm_up_and_the_cosine(model_dir: ModelDir, tmp_path: Path) -> None:
    config = make_config({"learning_rate": 1e-3, "scheduler_eta_min": 1e-5}, warmup_share=0.25)
    config.finetune.head_learning_rate = 1e-2
    fit = make_fit(model_dir("dinov2"), config)
    seen = []
    step = fit._step

    def watched(*args: Any) -> None:
        seen.append([group["lr"] for group in fit.optimizer.param_groups])
        step(*args)

    fit._step = watched  # type: ignore[method-assign]
    fit.run(make_run(tmp_path / "run"))
    backbone, head = [rates[0] for rates in seen], [rates[-1] for rates in seen]
    assert len(seen) == 12
    assert head == pytest.approx([10 * rate for rate in backbone])
    assert backbone[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert backbone[3:] == sorted(backbone[3:], reverse=True) and 0 < backbone[-1] < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns(model_dir: ModelDir, tmp_path: Path, precision: str) -> None:
    plan = replace(PLAN, precision=precision, epochs=8)
    fit = make_fit(model_dir("dinov2"), make_config(accumulation_steps=2), plan)
    assert fit.scaler.is_enabled() == (precision == "fp16")
    result = fit.run(make_run(tmp_path / "run"))
    assert result["val_pairwise_accuracy"] > 0.85
    assert all(p.dtype == torch.float32 for p in fit.model.parameters())
    best, last = (
        load_checkpoint(tmp_path / "run" / f"{name}_model.pt") for name in ("best", "last")
    )
    assert best["best_accuracy"] == result["val_pairwise_accuracy"] and "training_state" not in best
    assert (last["training_state"]["scaler"].get("scale", 0) > 1) == (precision == "fp16")
    rows = Run(tmp_path / "run").history()
    assert float(rows[-1]["train/loss"]) < 0.8 * float(rows[0]["train/loss"])


def test_a_compiled_model_draws_the_same_noise_in_both_passes(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are those of the same micro-batches in one graph."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    config = make_config(
        compile=True, stochastic_depth=0.5, patch_dropout=0.3, accumulation_steps=3
    )
    fit = make_fit(model_dir("dinov2"), config)
    from mirip_fast.finetune.step import batch_loss, take_gradients
    from mirip_fast.finetune.strategy import ALL, unfreeze

    unfreeze(fit.model, fit.strategy, ALL)
    fit.model.train()
    parts = fit._parts(IMAGES[:9])
    labels = torch.from_numpy(-TIERS[:9].astype(float))

    def loss_of(scores: torch.Tensor) -> torch.Tensor:
        return batch_loss(fit.objective, scores, labels, None, mixed=False)

    loss_of(torch.cat([part() for part in parts])).backward()
    parameters = dict(fit.model.trainable())
    expected = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    fit.optimizer.zero_grad(set_to_none=True)
    take_gradients(parts, 9, loss_of, list(parameters.values()), compiled=True)
    biggest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((parameters[name].grad - value).abs().max()) < 1e-4 * biggest, name  # type: ignore[operator]
