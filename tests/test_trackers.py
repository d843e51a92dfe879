"""What wandb and TensorBoard show of a run, and a sweep for wandb's agents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from made_run import TINY, draw
from mirip_fast_cli.main import run

from mirip_fast.training.run_folder import Run

PICTURES = {
    "held_out_confusion",
    "held_out_scores_by_tier",
    "held_out_tier_pairs",
    "held_out_mistakes",
}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in; its pictures and tables tell what they were made with."""
    fake = MagicMock()
    fake.Image.side_effect = lambda picture: ("picture", picture)

    def table(columns: list[str]) -> Any:
        made = MagicMock(columns=columns, rows=[])
        made.add_data.side_effect = lambda *cells: made.rows.append(cells)
        return made

    fake.Table.side_effect = table
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def logged(wandb: MagicMock) -> dict[str, Any]:
    """All that was reported, by its name."""
    calls = wandb.init.return_value.log.call_args_list
    return {name: value for call in calls for name, value in call.args[0].items()}


@pytest.mark.parametrize(
    ("options", "figures", "more"),
    [
        ([], {"left_out_pairwise_accuracy"}, {"held_out_reliability"}),
        (["--readout", "head", "--epochs", "2"], {"val/accuracy"}, set()),
        (
            ["--readout", "head", "--epochs", "2", "--folds", "3"],
            {"out_of_fold_pairwise_accuracy"},
            set(),
        ),
    ],
    ids=["gp", "head", "folds"],
)
def test_a_tracker_shows_what_our_own_pages_do(
    headed: Path, wandb: MagicMock, options: list[str], figures: set[str], more: set[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Light works of the worst tier are mistakes that any model makes.
    for i in (3, 7, 11, 15, 19, 23):
        name = f"그림 {i:02d}.png" if i % 3 == 0 else f"work_{i:02d}.png"
        draw(headed / "data" / "images" / name, 0.9, 200 + i)
    assert run(["-q", "embed", "data", *TINY]) == 0
    asked = ["--report-to", "wandb,tensorboard", "--wandb-pictures", "--name", "told"]
    assert run(["-q", "train", "--head-only", *options, *asked]) == 0
    (folder,) = (headed / "runs").glob("*-told")
    shown = logged(wandb)
    assert shown.keys() >= figures
    pictures = {name: value for name, value in shown.items() if isinstance(value, tuple)}
    assert pictures.keys() >= (PICTURES | more) and all(
        Path(p).is_file() for _, p in pictures.values()
    )
    table = shown["worst mistakes"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["should be higher"][1].size[0] == 32 and row["stands above it"][0] == "picture"
    assert row["its score"] > row["score"] and row["gap"] > 0 and row["its file"].endswith(".png")
    runs = 4 if "--folds" in options else 1  # each fold is a run, too
    assert wandb.init.return_value.finish.call_count == runs
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == pictures.keys()
    assert "worst mistakes/text_summary" in events.Tags()["tensors"]
    assert figures <= set(events.Tags()["scalars"])


def test_what_a_tracker_cannot_take_costs_no_run(headed: Path, wandb: MagicMock) -> None:
    wandb.Table.side_effect = ValueError("no tables today")
    train = ["-q", "train", "--head-only", "--report-to", "wandb", "--name"]
    assert run([*train, "told", "--wandb-pictures"]) == 0
    (folder,) = (headed / "runs").glob("*-told")
    assert Run(folder).info["status"] == "finished"
    # Pictures and names of works leave the machine on request only.
    wandb.init.return_value.log.reset_mock()
    wandb.Table.reset_mock()
    assert run([*train, "kept"]) == 0
    assert "held_out_confusion" in logged(wandb) and "held_out_mistakes" not in logged(wandb)
    wandb.Table.assert_not_called()


def test_a_sweep_for_wandbs_agents(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    varied = ("learning_rate=1e-5..1e-3", "projector_dropout=0..0.5", "features=cls,cls+mean")
    grid = [word for spec in varied for word in ("--grid", spec)]
    assert (
        run(["sweep", *grid, "--random", "7", "--epochs", "3", "--wandb-sweep", "sweep.yaml"]) == 0
    )
    assert "Next: wandb sweep sweep.yaml" in capfd.readouterr().out
    made = yaml.safe_load(Path("sweep.yaml").read_text())
    assert (made["method"], made["run_cap"]) == ("random", 7)
    rate, dropout, features = made["parameters"].values()
    assert rate == {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    assert dropout == {"distribution": "uniform", "min": 0.0, "max": 0.5}
    assert features == {"values": ["cls", "cls+mean"]}
    # As the agent fills it in, it is a command of ours.
    *command, arguments = made["command"]
    assert command[0] == "mirip-fast" and arguments == "${args}" and "--epochs=3" in command
    chosen = [
        f"--{name}={value}"
        for name, value in zip(made["parameters"], (1e-4, 0.1, "cls"), strict=True)
    ]
    assert run([*command[1:], *chosen, "--report-to", "none"]) == 0
    assert run(["sweep", "--grid", "nothing=1", "--wandb-sweep", "other.yaml"]) == 1
    assert not Path("other.yaml").exists()
