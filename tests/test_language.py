"""The command line in Korean: what people read is translated, and what is theirs stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_run import make_data
from mirip_fast_cli.main import run

from mirip_fast.language import languages, set_language, tr

ROOT = Path(__file__).resolve().parent.parent
_BLANK = re.compile(r"\{\d*\}")


@pytest.fixture(autouse=True)
def _english_again() -> object:
    yield
    set_language("en")


def test_help_and_errors_are_korean_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["rank", "--lang", "ko", "--help"]) == 0
    told = capsys.readouterr().out
    assert "사용법" in told and "정렬합니다" in told and "--anyway" in told
    assert run(["--lang", "ko", "rnak"]) == 2
    err = capsys.readouterr().err
    assert "오류" in err and "'rank'" in err  # a name is no word
    monkeypatch.setenv("LC_ALL", "ko_KR.UTF-8")
    assert run(["rank", "--help"]) == 0
    assert "사용법" in capsys.readouterr().out
    assert run(["rank", "--help", "--lang", "en"]) == 0
    assert "Usage" in capsys.readouterr().out
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run(["rank", "--help"]) == 0
    assert "Usage" in capsys.readouterr().out
    assert run(["rank", "--lang", "kr"]) == 2 and "ko" in capsys.readouterr().err


def test_a_result_is_korean_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(Path("no grades"), 4)  # a folder that is called as something that is said
    tiny = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "0"]
    assert run(["--lang", "ko", "embed", "no grades", *tiny]) == 0
    told = capsys.readouterr()
    assert "이미지 4개" in told.out + told.err and "no grades" in told.err


def test_what_no_entry_fits_stays_english() -> None:
    set_language("ko")
    assert tr("Purple elephants of 3 kinds.") == "Purple elephants of 3 kinds."
    assert tr("") == ""


def test_catalogues_fit_the_messages_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten messages at least; more are told by `make words`, which adds what is new."""
    pytest.importorskip("babel")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from babel.messages.mofile import read_mo
    from babel.messages.pofile import read_po
    from messages import messages

    for language in languages()[1:]:
        folder = ROOT / "mirip_fast/locale" / language / "LC_MESSAGES"
        entries, compiled = (
            {entry.id: entry.string for entry in read((folder / name).open("rb")) if entry.id}
            for read, name in ((read_po, "messages.po"), (read_mo, "messages.mo"))
        )
        assert {k: v for k, v in entries.items() if v} == compiled, "run `make words`"
        for text, translation in entries.items():
            blanks, there = _BLANK.findall(translation), len(_BLANK.findall(text))
            numbers = [int(blank[1:-1]) for blank in blanks if blank != "{}"]
            fits = max(numbers) < there and "{}" not in blanks if numbers else len(blanks) == there
            assert fits or not translation, text
        now = messages()
        missing = [text for text in now if not entries.get(text)]
        assert len(missing) < len(now) / 10, missing[:20]


def test_half_a_sentence_is_no_name_and_blanks_end_with_the_line() -> None:
    """«{} pictures» once fitted «data.xlsx: the column '파일' names the pictures», and lines of tables."""
    set_language("ko")
    told = tr("data/a.xlsx: the column '파일' names the pictures")
    assert "'파일'" in told and not told.startswith("그림")
    head = "58 images (S 3, A 55) in 21 groups, 9 pairs of different tiers"
    assert tr(f"{head}\n\nS  A  0.5\nLee  0.6") == f"{tr(head)}\n\nS  A  0.5\nLee  0.6"
    assert "쌍 9개" in tr(head)
    assert (
        tr("CSV column with the tier.  [default: tier]")
        != tr("[default: tier]")
        == "[기본값: tier]"
    )
    assert tr("- 3 images with features, all graded").startswith("- ")
    even = "The model is not clearly better or worse than chance (+1.8 points, -36.0 to +27.6)."
    why = "Whether it is better than the last run before it is unknown, as there is none."
    assert tr(f"{even} {why}").startswith(tr(even) + " ") and "chance" not in tr(even)
    place = tr("a.xlsx, sheet '작품', row 4, tier: unknown tier 'X'")
    assert "'작품' 시트, 4행, tier 열" in place
    odd = (
        "It had not trained on, and which works were handed in on purple elephants of 3 applicants"
    )
    assert tr(odd) == odd
