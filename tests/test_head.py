"""Projector and score head, with torch and without; the checkpoints they are kept in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mirip_fast.config import EmbedConfig, HeadConfig
from mirip_fast.errors import CheckpointError, DiskFullError
from mirip_fast.features.views import View
from mirip_fast.models.checkpoint import KEYS, load_checkpoint, save_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import HEAD_FILE, NumpyHead
from mirip_fast.portfolio.ranking import rank_scores, spreadsheet_safe, write_ranking
from mirip_fast.ranking.batches import draw_pairs, image_batches
from mirip_fast.ranking.scorer import load_score_model, save_numpy_head
from mirip_fast.training.early_stopping import EarlyStopping
from mirip_fast.training.optim import make_optimizer, make_scheduler
from mirip_fast.training.run_folder import create_run, newest_model
from mirip_fast.training.trackers import Trackers

INFO = ModelInfo({"a": 1}, EmbedConfig(), (View(28),), "cls", ("S", "A"), 24)


def test_the_document_s_layers() -> None:
    head = RankingHead(1024)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.dim() == 2}
    assert shapes == {
        "projector.layers.0.weight": (512, 1024),
        "projector.layers.4.weight": (256, 512),
        "score_head.layers.0.weight": (64, 256),
        "score_head.layers.3.weight": (1, 64),
    }
    embeddings = head.projector(torch.randn(5, 1024))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    assert head(torch.randn(5, 1024)).shape == (5,)


@pytest.mark.parametrize("n", [0, 1, 7, 9000])
def test_numpy_head_equals_torch(n: int) -> None:
    torch.manual_seed(1)
    head = RankingHead(24, HeadConfig(projector_hidden_dim=40, projector_output_dim=16)).eval()
    features = np.random.default_rng(0).standard_normal((n, 24)).astype(np.float32) * 5
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).numpy()
    scores = NumpyHead({k: v.numpy() for k, v in head.state_dict().items()})(features)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="24"):
        NumpyHead({k: v.numpy() for k, v in head.state_dict().items()})(
            np.zeros((3, 5), np.float32)
        )


def checkpoint(head: RankingHead) -> dict[str, object]:
    empty: dict[str, object] = {key: {} for key in KEYS}
    return {**empty, "epoch": 1, "model_state_dict": head.state_dict(), "model": INFO.to_dict()}


def test_the_head_beside_another_checkpoint_is_not_used(tmp_path: Path) -> None:
    first, second = RankingHead(24), RankingHead(24)
    save_checkpoint(tmp_path / "best_model.pt", checkpoint(first))
    save_numpy_head(tmp_path, tmp_path / "best_model.pt", first.state_dict(), INFO)
    row = np.ones((1, 24), np.float32)
    before = load_score_model(tmp_path / "best_model.pt").head(row)
    save_checkpoint(tmp_path / "best_model.pt", checkpoint(second))
    after = load_score_model(tmp_path / "best_model.pt").head(row)
    with torch.no_grad():
        np.testing.assert_allclose(before, first.eval()(torch.ones(1, 24)), atol=1e-5)
        np.testing.assert_allclose(after, second.eval()(torch.ones(1, 24)), atol=1e-5)
    (tmp_path / HEAD_FILE).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=HEAD_FILE):
        load_score_model(tmp_path / "best_model.pt")


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    head = RankingHead(24)
    save_checkpoint(tmp_path / "best_model.pt", checkpoint(head))
    save_numpy_head(tmp_path, tmp_path / "best_model.pt", head.state_dict(), INFO)
    code = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from mirip_fast.ranking.scorer import load_score_model;"
        f"load_score_model(Path({str(tmp_path / 'best_model.pt')!r})).head(np.ones((2, 24), 'f4'));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_checkpoint_can_not_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**dict.fromkeys(KEYS), "epoch": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="plain data"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last_model.pt"
    save_checkpoint(path, checkpoint(RankingHead(24)))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"last_model\.pt"):
        save_checkpoint(path, checkpoint(RankingHead(24)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_written_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file'?") as error:
        save_checkpoint(tmp_path / "file" / "best_model.pt", checkpoint(RankingHead(24)))
    assert "partial" not in str(error.value)


def test_equal_scores_share_a_rank() -> None:
    ranking = rank_scores(list("abcde"), list("ABCDE"), [1.0, 3.0, float("nan"), 1.0, 0.5])
    assert [(w.rank, w.file) for w in ranking] == [(1, "b"), (2, "a"), (2, "d"), (4, "e")]


def test_names_survive_and_formulas_do_not(tmp_path: Path) -> None:
    import csv

    names = [
        "=1+1.jpg",
        "+a",
        "-b",
        "@c",
        "new\nline.jpg",
        "그림 🎨.jpg",
        "q\"uote,;'.jpg",
        "latin\udce9.jpg",
    ]
    write_ranking(tmp_path, rank_scores(names, names, list(range(len(names)))), {})
    with (tmp_path / "ranking.csv").open(
        encoding="utf-8", errors="surrogateescape", newline=""
    ) as f:
        cells = [row["file"] for row in csv.DictReader(f)][::-1]
    assert cells == ["'=1+1.jpg", "'+a", "'-b", "'@c", *names[4:]]
    text = (tmp_path / "ranking.json").read_bytes().decode("utf-8", "surrogateescape")
    assert [w["file"] for w in json.loads(text)["works"]][::-1] == names
    assert spreadsheet_safe("plain.jpg") == "plain.jpg"


def test_drawn_pairs_are_uniform_over_other_tiers() -> None:
    tiers = np.array([0, 0, 1, 2, 2, 2, 1, 3])
    counts = np.zeros((8, 8))
    for seed in range(4000):
        pairs = draw_pairs(tiers, np.random.default_rng(seed))
        assert len(pairs) == 8 and (tiers[pairs[:, 0]] < tiers[pairs[:, 1]]).all()
        np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    for i in range(8):
        for j in range(8):
            # i draws j with probability 1 / (images of other tiers), and j draws i likewise
            chance = 0.0
            if tiers[i] < tiers[j]:
                chance = 1 / (tiers != tiers[i]).sum() + 1 / (tiers != tiers[j]).sum()
            assert counts[i, j] / 4000 == pytest.approx(chance, abs=0.05)


def test_batches_hold_every_image_once() -> None:
    batches = list(image_batches(103, 32, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert max(map(len, batches)) <= 32 and max(map(len, batches)) - min(map(len, batches)) <= 1


def test_schedule_warms_up_and_ends_at_eta_min() -> None:
    from mirip_fast.config import TrainConfig

    head = RankingHead(8)
    optimizer = make_optimizer(head, TrainConfig(weight_decay=0.1), 1e-3)
    decayed, free = optimizer.param_groups
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() < 2 for p in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert sum(len(g["params"]) for g in (decayed, free)) == len(list(head.parameters()))
    scheduler = make_scheduler(
        optimizer, total_steps=100, warmup_steps=10, learning_rate=1e-3, eta_min=1e-6
    )
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-3 / 11) and max(rates) == rates[10] == pytest.approx(1e-3)
    middle = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * 45 / 90))
    assert rates[55] == pytest.approx(middle) and rates[100] == pytest.approx(1e-6)


def test_early_stopping() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    assert [stopping.update(v, e) for e, v in enumerate((0.5, 0.55, 0.7), 1)] == [True, True, True]
    assert not stopping.should_stop  # 0.7 is 0.2 above 0.5, which is what counted last
    assert [stopping.update(v, e) for e, v in enumerate((0.75, 0.6), 4)] == [True, False]
    assert stopping.should_stop and (stopping.best, stopping.best_epoch) == (0.75, 4)
    again = EarlyStopping(patience=2, min_delta=0.1)
    again.load_state_dict(stopping.state_dict())
    assert again == stopping
    assert not EarlyStopping(patience=0, waited=99).should_stop


def test_a_tracker_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        calls = 0

        def log(self, values: object, step: int) -> None:
            Failing.calls += 1
            raise ConnectionError("offline")

        def finish(self, best_model: Path | None) -> None:
            raise AssertionError("was left out")

    trackers = Trackers({"wandb": Failing()})
    trackers.log({"a": 1.0}, 1)
    trackers.log({"a": 1.0}, 2)
    trackers.finish(None)
    assert Failing.calls == 1 and caplog.text.count("wandb failed") == 1


def test_the_newest_model_is_finished_and_no_trial(tmp_path: Path) -> None:
    runs = [
        create_run(tmp_path, name, debug=name == "trial")
        for name in ("old", "good", "trial", "dead")
    ]
    for number, run in enumerate(runs):
        run.update(status="running" if run.path.name.endswith("dead") else "finished")
        run.update(started=f"2026-01-0{number + 1}")
        run.best.touch()
    assert newest_model(tmp_path).path.name.endswith("good")
    runs[1].best.unlink()
    assert newest_model(tmp_path).path.name.endswith("old")
