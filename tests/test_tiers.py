"""`rank --tiers`: medoids and win rates against plain loops; anchors kept with a model; the command."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_page import anchors_of, works
from made_run import flat, scored
from made_tables import images_of
from mirip_fast_cli.main import run

from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.text_table import display_width
from mirip_fast.portfolio.ranking import rank_scores, ranking_table, write_ranking
from mirip_fast.ranking.anchors import anchor_counts, anchor_remarks, find_anchors, win_rates
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.held_out import load_held_out, save_held_out
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import accept_files

TIERS = ("S", "A", "B", "C")


def cosine_distances(rows: np.ndarray) -> np.ndarray:
    """1 − cosine of all pairs by two plain loops."""
    n = len(rows)
    out = np.empty((n, n))
    for i, j in itertools.product(range(n), range(n)):
        a, b = rows[i].astype(np.float64), rows[j].astype(np.float64)
        out[i, j] = 1 - (a @ b) / np.sqrt((a @ a) * (b @ b))
    return out


def test_win_rates_against_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    scores, tiers = rng.integers(0, 5, 63) / 4, rng.integers(0, 3, 63)
    shas = [bytes([i // 2]) * 32 for i in rng.permutation(63)]  # most pictures twice
    others = range(40, 63)
    graded = [(TIERS[tiers[k]], shas[k], float(scores[k])) for k in others]
    found = win_rates(anchors_of(graded, TIERS, 9), scores, shas)
    for i in range(63):
        for tier in range(3):
            points = [
                1.0 if scores[i] > scores[k] else 0.5 if scores[i] == scores[k] else 0.0
                for k in others
                if tiers[k] == tier and shas[k] != shas[i]
            ]
            assert found[TIERS[tier]][i] == pytest.approx(sum(points) / len(points))
    assert np.isnan(found["C"]).all()


def test_held_out_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    scores = np.array([0.1 + 0.2, -1e-17, 3.0])
    kept = scored("SAB", scores, [2, 0, 1], tier_score=[None, 1.5, 0.1], group=["x", None, "x"])
    save_held_out(tmp_path, kept)
    read = load_held_out(tmp_path, tuple("SAB"))
    assert read is not None and read.scores.tolist() == scores.tolist()
    assert (read.ids, read.groups, read.tier_scores) == (kept.ids, kept.groups, kept.tier_scores)
    assert read.tier_codes.tolist() == [2, 0, 1]


def test_remarks_tell_what_anchors_lack() -> None:
    def made(per_tier: int, tiers: tuple[str, ...]) -> dict:
        return anchors_of([(tier, b"x", 0.0) for tier in tiers] * per_tier, TIERS, 10)

    absent, few = anchor_remarks(made(7, ("S", "A", "C")))
    assert "tier B: nothing is compared with it" in absent
    assert "Fewer than 10" in few and "S (7), A (7), C (7)" in few
    assert anchor_remarks(made(10, TIERS)) == []


@pytest.mark.parametrize("tiers", [TIERS, ("최우수", "우수", "보통"), tuple("ABCDEFGH")])
@pytest.mark.parametrize("known", [True, False])
def test_the_table_with_win_rates_fits_into_100_columns(
    tiers: tuple[str, ...], known: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    codes = np.arange(200 if known else 20) % len(tiers)
    held_out = rng.normal(size=len(codes)) - codes
    calibration = fit_calibration(held_out, codes, tiers, source="out-of-fold")
    anchors = anchors_of([(name, bytes([t]), -float(t)) for t, name in enumerate(tiers)], tiers, 1)
    scores = rng.normal(size=30)
    files = [f"매우 긴 이름의 작품 {'x' * 40} {i}.png" for i in range(30)]
    rates = win_rates(anchors, scores, [bytes([0])] * 30)
    one, two = (
        rank_scores(
            works(files), scores, calibration=calibration,
            draws=scores + 0.1 * rng.normal(size=(60, 30)), win_rates=against,
        )
        for against in (None, rates)
    )  # fmt: skip
    lines = ranking_table(two).split("\n")
    assert max(map(display_width, lines)) <= 100
    assert ("sure %" in lines[0]) == ("tier" in lines[0]) == known and "verdict" not in lines[0]
    assert (f">{tiers[0]} %" in lines[0]) == (len(tiers) <= 5)
    assert one.get("tier", pd.Series()).equals(
        two.get("tier", pd.Series())
    )  # one truth, compared or not
    write_ranking(tmp_path, two, {})
    with (tmp_path / "ranking.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert row["tier"] == (
            max(tiers, key=lambda tier: float(row[f"p_{tier}"])) if known else "unknown"
        )
        assert row[f"wins_{tiers[0]}"] == "unknown"  # its only anchor is the work itself
        place = files.index(row["file"])
        assert float(row[f"wins_{tiers[-1]}"]) == rates[tiers[-1]][place]


def run_of(work: Path) -> Path:
    (folder,) = (work / "runs").iterdir()
    return folder


def kept_in(folder: Path) -> dict:
    return json.loads((folder / "anchors.json").read_text(encoding="utf-8"))


def test_the_command(calibrated: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run_of(calibrated)
    kept = kept_in(folder)  # training has written it
    assert run(["rank", "data/images", "--tiers"]) == 0
    out = capfd.readouterr().out
    assert "compared with S 10, A 10, B 10, C 10 held-out works (validation)" in flat(out)
    told = json.loads((calibrated / "ranking.json").read_text(encoding="utf-8"))
    assert told["anchors"]["anchors"] == kept["anchors"]
    score_of = {work["image_id"]: work["score"] for work in told["works"]}
    held_out = load_held_out(folder, TIERS)
    assert held_out is not None
    by_id = dict(zip(held_out.ids, held_out.scores, strict=True))
    tier_of = {i: TIERS[t] for i, t in zip(held_out.ids, held_out.tier_codes, strict=True)}
    for anchor in kept["anchors"]:
        assert by_id[anchor["image_id"]] == anchor["score"]  # held out, not of a training work
        assert tier_of[anchor["image_id"]] == anchor["tier"]
    own = {Path(anchor["path"]).name: anchor for anchor in kept["anchors"]}
    for ranked in told["works"]:
        for tier in TIERS:
            others = [
                anchor["score"]
                for name, anchor in own.items()
                if anchor["tier"] == tier and name != ranked["file"]
            ]
            points = [np.sign(ranked["score"] - score) / 2 + 0.5 for score in others]
            assert ranked["win_rates"][tier] == pytest.approx(np.mean(points))
        chances = ranked["tier_probabilities"]
        assert ranked["tier"] == max(chances, key=chances.get) and "verdict" not in ranked
    header, *_ = out.split("\n")
    assert "tier" in header and "sure %" in header and ">S %" in header
    assert "agreement" not in kept
    named = {ranked["file"]: ranked["tier"] for ranked in told["works"]}
    assert len(score_of) == 160

    assert run(["rank", "data/images"]) == 0
    assert "sure %" not in capfd.readouterr().out.split("\n")[0]
    told = json.loads((calibrated / "ranking.json").read_text(encoding="utf-8"))
    assert "anchors" not in told and told["works"][0]["win_rates"] is None
    assert {ranked["file"]: ranked["tier"] for ranked in told["works"]} == named


def test_anchors_are_medoids_of_the_cached_features(calibrated: Path) -> None:
    model = load_score_model(run_of(calibrated) / "best_model.pt")
    found = find_anchors(model, calibrated / "cache", 3)
    assert set(anchor_counts(found).values()) == {3} and kept_in(run_of(calibrated))["asked"] == 3
    from mirip_fast.config import DataConfig
    from mirip_fast.features.store import FeatureStore

    images = load_split(run_of(calibrated) / "split.csv", TIERS, DataConfig()).part("val")
    store = FeatureStore.open(calibrated / "cache" / model.info.fingerprint_id)
    assert model.info.features == "cls+mean"  # what the head looks at
    kinds = [name for name in sorted(store.series()) if name.split(".")[0] in ("cls", "mean")]
    rows = np.hstack([store.read(name, store.rows(name, images.hashes)) for name in kinds])
    for tier in range(4):
        index = np.flatnonzero(images.tier_codes == tier)
        distances = cosine_distances(rows[index])
        ids = [images_of(images)[i].image_id for i in index]
        chosen = [
            ids.index(work["image_id"]) for work in found["anchors"] if work["tier"] == TIERS[tier]
        ]

        def cost(those: list[int], distances: np.ndarray = distances) -> float:
            return float(distances[:, those].min(1).sum())

        for place, other in itertools.product(range(3), range(len(ids))):
            assert cost([*chosen[:place], other, *chosen[place + 1 :]]) >= cost(chosen) - 1e-5


def test_kept_anchors_are_enough_and_others_need_the_cache(
    calibrated: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (calibrated / "few").mkdir()
    shutil.copy(calibrated / "data" / "images" / "작품 000.png", calibrated / "few" / "a.png")
    model = load_score_model(run_of(calibrated) / "best_model.pt")
    empty = calibrated / "empty"
    empty.mkdir()
    assert find_anchors(model, empty)["asked"] == 10
    assert find_anchors(model, empty, 10)["asked"] == 10
    with pytest.raises(Exception, match="--tiers: the features") as caught:
        find_anchors(model, empty, 4)
    assert "Without --anchors the 10 of each tier" in str(caught.value)
    assert run(["rank", "few", "--tiers", "--anchors", "99"]) == 0
    out = flat(capfd.readouterr().out)
    assert "Fewer than 99 held-out works are there of tier S (12), A (12), B (12), C (12)" in out
    assert kept_in(run_of(calibrated))["asked"] == 99
    assert run(["rank", "few", "--tiers"]) == 0  # now those are the kept ones
    assert "S 12, A 12" in flat(capfd.readouterr().out)


def test_what_can_not_be_is_refused(calibrated: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run_of(calibrated)
    assert run(["rank", "data/images", "--anchors", "3"]) == 2
    assert "--anchors says how many works --tiers compares with" in capfd.readouterr().err
    best = (folder / "best_model.pt").read_bytes()
    other = next(p for p in folder.glob("checkpoint_*.pt") if p.read_bytes() != best)
    assert run(["rank", "data/images", "--tiers", "--checkpoint", str(other)]) == 1
    err = flat(capfd.readouterr().err)
    assert "those of its best_model.pt" in err and kept_in(folder)["model"] == "best_model.pt"

    kept = kept_in(folder)
    assert json.loads(
        json.dumps(find_anchors(load_score_model(folder / "best_model.pt"), Path()))
    ) == {name: kept[name] for name in kept if not name.startswith("model")}
    wrong = ({**kept, "version": 99}, {**kept, "anchors": [{"tier": "S"}]}, {**kept, "asked": None})
    for text in ("{", *map(json.dumps, wrong)):
        (folder / "anchors.json").write_text(text)
        assert run(["rank", "data/images", "--tiers"]) == 1
        assert "are chosen again once it is removed" in flat(capfd.readouterr().err)
    (folder / "anchors.json").unlink()
    accept_files(folder)
    assert run(["rank", "data/images", "--tiers"]) == 0
    assert kept_in(folder)["asked"] == 10

    (folder / "anchors.json").unlink()
    rows = (folder / "held_out.csv").read_text(encoding="utf-8").splitlines()
    only = [rows[0], *(row for row in rows[1:] if ",S,," in row)]
    (folder / "held_out.csv").write_text("\n".join(only) + "\n", encoding="utf-8")
    accept_files(folder)
    assert run(["rank", "data/images", "--tiers"]) == 1
    assert "held-out works are of S only" in flat(capfd.readouterr().err)
    both = [*only, *(row for row in rows[1:] if ",B,," in row)]
    (folder / "held_out.csv").write_text("\n".join(both) + "\n", encoding="utf-8")
    accept_files(folder)
    assert run(["rank", "data/images", "--tiers"]) == 0
    assert "No held-out work is of tier A, C" in flat(capfd.readouterr().out)
    told = json.loads((calibrated / "ranking.json").read_text(encoding="utf-8"))
    assert {ranked["win_rates"]["A"] for ranked in told["works"]} == {None}
    (folder / "anchors.json").unlink()
    (folder / "held_out.csv").unlink()
    accept_files(folder)
    assert run(["rank", "data/images", "--tiers"]) == 1
    assert "no held-out scores (held_out.csv)" in flat(capfd.readouterr().err)
