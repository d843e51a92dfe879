"""`evaluate --html`: the figures are the evaluator's, and nothing that came from outside is markup."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_evaluation import made_evaluation_page, made_report
from made_page import HOSTILE, check_parts, data_of

from mirip_fast.evaluation.text_table import printable
from mirip_fast.portfolio import page as page_module

PARTS = Path(page_module.__file__).parent / "evaluation_files"
HISTORY = (
    "epoch,train/loss,val/loss,train/accuracy,val/accuracy\n"
    "1,0.7,0.69,0.5,0.55\n2,0.5,0.55,0.8,0.7\n3,0.3,0.6,0.9,0.65\n"
)


def test_every_number_is_the_evaluators(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    report = made_report(
        groups=[f"그룹 {i}" for i in rng.integers(8, size=96)],
        within=["회화" if i % 3 else "조소" for i in range(96)],
    )
    data = data_of(made_evaluation_page(tmp_path, report, within="department", history=HISTORY))
    told = data["report"]
    measures = told["measures"]
    assert measures["accuracy"]["value"] == report.pairwise_accuracy
    interval = report.pairwise_accuracy_interval
    assert interval is not None and measures["accuracy"]["low"] == interval.low
    assert measures["within"]["value"] == report.within_accuracy
    assert measures["tau"]["value"] == report.kendall_tau_b
    assert report.probabilities is not None and report.probabilities["pairs"] is not None
    assert measures["ece"]["value"] == report.probabilities["pairs"]["ece"]
    assert told["confusion"] == report.probabilities["tiers"]["confusion"]
    for row, true in zip(told["tierPairs"], report.tier_pairs.itertuples(), strict=True):
        assert (row["better"], row["worse"], row["pairs"]) == (true.better, true.worse, true.pairs)
        assert row["value"] == true.accuracy and row["high"] == true.interval.high
    assert [row["value"] for row in told["groups"]] == report.groups["accuracy"].tolist()
    assert len(told["groups"]) == 8
    by_name = report.within_values.set_index("value")["accuracy"].to_dict()
    assert {row["name"]: row["value"] for row in told["within"]} == by_name
    (fit,) = data["learning"]
    assert fit["val_accuracy"] == [0.55, 0.7, 0.65] and fit["best"] == 2
    for shown, true in zip(told["mistakes"], report.worst_mistakes().itertuples(), strict=True):
        assert shown["better"]["score"] == pytest.approx(true.better_score, rel=1e-5)
        heat = report.probabilities["temperature"]
        assert shown["chance"] == pytest.approx(1 / (1 + math.exp(-true.gap / heat)), abs=1e-4)


def test_the_violins_are_of_the_scores_that_were_judged(tmp_path: Path) -> None:
    report = made_report()
    tiers = data_of(made_evaluation_page(tmp_path, report))["report"]["violins"]["tiers"]
    for number, tier in enumerate(tiers):
        scores = np.sort(report.scores[report.tiers == number])
        assert tier["count"] == len(scores)
        assert tier["ticks"] == pytest.approx(scores.tolist(), rel=1e-5, abs=1e-5)
        assert tier["median"] == pytest.approx(np.median(scores), rel=1e-5)


def test_nothing_from_outside_is_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    scores = np.arange(len(HOSTILE), dtype=float)  # the worst tier scores highest
    tiers = np.minimum(3, np.arange(len(HOSTILE)) // 3)
    names = ("<b>S", "A&amp;", "'B", '"C')
    report = made_report(scores, tiers, names=names, groups=list("aabbccddeef"), calibrated=False)
    page = made_evaluation_page(tmp_path, report, files=HOSTILE, within="</script><i>")
    text = page.read_text(encoding="utf-8", errors="strict")
    for word in ("window.hacked=1", "<b>S", "</script><i>"):
        head = text.split('id="data">')[0]
        assert word not in head
    assert text.count("<script") == text.count("</script>")
    bare = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", bare)
    assert "default-src &#x27;none&#x27;" in text
    mistakes = data_of(page)["report"]["mistakes"]
    shown = {side["name"] for pair in mistakes for side in (pair["better"], pair["worse"])}
    assert shown and shown <= {printable(Path(name).name) for name in HOSTILE}
    assert all(pair["better"]["picture"] for pair in mistakes)


def test_both_languages_say_the_same_things_and_every_word_is_there() -> None:
    check_parts("evaluation_files")
    words = json.loads((PARTS / "words.json").read_text(encoding="utf-8"))
    assert set(words["en"]) == set(words["ko"])
    common = json.loads((PARTS.parent / "page_files" / "words.json").read_text(encoding="utf-8"))
    program = "".join(path.read_text(encoding="utf-8") for path in PARTS.glob("*.js"))
    asked = set(re.findall(r'say\(\s*"(\w+)"', program))
    asked |= {
        name + end for name in re.findall(r'\bpart\("(\w+)"', program) for end in ("", "Text")
    }
    assert asked <= set(words["en"]) | set(common["en"])
