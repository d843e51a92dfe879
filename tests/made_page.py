"""A ranking whose scores are made up, and the page of it: no model is trained, no picture looked at."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_run import scored
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.evaluation.calibration import Calibration, fit_calibration
from mirip_fast.portfolio import page as page_module
from mirip_fast.portfolio.page import Reason, write_page
from mirip_fast.portfolio.rank import RankDone
from mirip_fast.portfolio.ranking import rank_applicants, rank_scores
from mirip_fast.portfolio.thumbnails import encode_picture
from mirip_fast.ranking.anchors import win_rates
from mirip_fast.ranking.held_out import save_held_out

TIERS = ("S", "A", "B", "C")

#: Names that break pages; the folder is there for the slash.
HOSTILE = (
    "<script>window.hacked=1</script>.png",
    "</script><img src=x onerror=window.hacked=1>.png",
    "\" onload=window.hacked=1 '.png",
    "line\nbreak\ttab.png",
    "u\u2028sep\u2029.png",
    "\u202egnp.exe",
    "javascript:window.hacked=1.png",
    "{{data}} ${window.hacked=1} `x` $& .png",
    "100% #1?x=y&amp;z.png",
    "🎨 그림 작품.png",
    "not utf-8 \udcff.png",
)


def pictures(folder: Path, names: Sequence[str], side: int = 24) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (i % 256, i // 256, 90)
        Image.new("RGB", (side, side * 2 // 3), colour).save(folder / name, "PNG")


def made_map(root: Path, name: str) -> dict[Path, Reason]:
    """An explanation of one work, which looks like a graded work with a hostile name, and one that is gone."""
    orange = Image.new("RGB", (30, 20), (230, 97, 1))
    orange.save(root / "<b>like.png")
    files = [root / name for name in ("<b>like.png", "<b>gone.png")]
    likes = pd.DataFrame({"file": files, "tier": "S", "cosine": 0.9})
    return {root / name: (encode_picture(orange, 30), likes)}


def works(
    files: Sequence[str], image_ids: Sequence[str] | None = None, **columns: object
) -> pd.DataFrame:
    """The table of works that a ranking starts from."""
    return pd.DataFrame({"file": files, "image_id": image_ids or files, **columns})


def unknown() -> Calibration:
    return Calibration("none", TIERS, (0, 0, 0, 0), None, "unknown: no <file>", None, None, ())


def anchors_of(
    graded: Sequence[tuple[str, bytes, float]], tiers: Sequence[str], asked: int
) -> dict[str, Any]:
    """Anchors of these tiers, contents and scores."""
    found = [
        {"tier": tier, "image_id": str(i), "path": f"{i}.png", "sha256": sha.hex(), "score": score}
        for i, (tier, sha, score) in enumerate(graded)
    ]
    held_out = dict.fromkeys(tiers, 50)
    return {
        "version": 1,
        "source": "out-of-fold",
        "asked": asked,
        "held_out": held_out,
        "anchors": found,
    }


def made_ranking(
    root: Path,
    names: Sequence[str],
    *,
    known: bool = True,
    against: bool = False,
    given: Mapping[str, Sequence[object]] | None = None,
    failures: Sequence[tuple[str, str]] = (),
    hands: Sequence[str | None] | None = None,
) -> RankDone:
    """A ranking in the order of ``names``, of what stands for the model of a run in ``root``/../run."""
    run = root.parent / "run"
    run.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tiers = np.arange(200) % 4
    held_out = scored(TIERS, rng.normal(size=200) - tiers, tiers.tolist())
    save_held_out(run, held_out)
    calibration = fit_calibration(held_out.scores, tiers, TIERS, source="out-of-fold")
    scores = np.linspace(1, -4, len(names))
    draws = scores + 0.3 * rng.normal(size=(60, len(names)))
    anchors = None
    if against:  # five of the held-out works of S, A and B; none of C
        graded = [
            (TIERS[tiers[i]], bytes([i]), float(held_out.scores[i]))
            for i in range(20)
            if tiers[i] < 3
        ]
        anchors = anchors_of(graded, TIERS, 10)
    rates = None if anchors is None else win_rates(anchors, scores, [b""] * len(names))
    people, portfolio = None, {}
    if hands is not None:
        people = rank_applicants(hands, scores, names, "mean", draws=draws)
        portfolio = {"by": "by", "within": None, "why": "The mean of <b>.", "remarks": []}
    ranking = rank_scores(
        works(names, [f"id {i}" for i in range(len(names))], **(given or {})), scores,
        calibration=calibration if known else None, draws=draws if known else None,
        win_rates=rates,
    )  # fmt: skip
    hashes = {
        name: hashlib.sha256((root / name).read_bytes()).digest()
        for name in names
        if (root / name).is_file()
    }
    model = SimpleNamespace(
        checkpoint=run / "best.pt",
        info=SimpleNamespace(tiers=TIERS, views=(SimpleNamespace(size=28, flip=False),)),
        process=None,
        knows_grades=False,
    )
    return RankDone(
        root, model, ranking, list(failures), list(names), calibration if known else unknown(), 60 if known else 0,
        None if known else "unknown: no heads", 3, root, hashes, SimpleNamespace(series=dict), anchors, people, portfolio,
    )  # fmt: skip


def made_page(
    root: Path,
    names: Sequence[str],
    page: Path,
    *,
    stacks: dict[int, dict[str, object]] | None = None,
    maps: dict[Path, Reason] | None = None,
    **options: object,
) -> list[Path]:
    """Write the page of a made ranking; the pictures have to be there."""
    done = made_ranking(root, names, **options)
    config = Config()
    config.embed.workers = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "find_stacks", lambda *_: stacks or {})
        return write_page(page, done, config, reasons=maps)


def data_of(page: Path) -> dict[str, Any]:
    """What the script of a written page has to show."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def check_parts(folder: str) -> None:
    """The parts of a kind of page bring nothing from elsewhere and make nothing from markup, and its words ask
    for the same in every language."""
    parts = Path(page_module.__file__).parent / folder
    for part in parts.iterdir():
        text = part.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for word in ("http:", "https:", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML",
                     "document.write", "eval(", "url("):  # fmt: skip
            assert word not in text, (part.name, word)
    words = json.loads((parts / "words.json").read_text(encoding="utf-8"))
    assert {key for key in words["en"] if not key.endswith("_one")} == set(words["ko"])
    for key, text in words["ko"].items():
        asked = set(re.findall(r"\{\w+\}", words["en"][key]))
        assert set(re.findall(r"\{\w+\}", text)) == asked, key
