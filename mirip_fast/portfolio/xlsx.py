"""A ranking as an Excel workbook: small pictures, a header that stays, filters, colours of the tiers."""

from __future__ import annotations

import functools
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.splits import members_of
from mirip_fast.data.spreadsheets import header_text
from mirip_fast.errors import DataError
from mirip_fast.features.phase_one import default_workers
from mirip_fast.files import write_atomically
from mirip_fast.portfolio.ranking import given_columns, of_tiers
from mirip_fast.portfolio.thumbnails import make_thumbnails
from mirip_fast.text import closest

if TYPE_CHECKING:
    import pandas as pd


_SIDE = 96  # pixels of a small picture's longer side
_EMU = 9525  # English Metric Units of a pixel
_MOST_SHEETS = 200
_MOST_ROWS = 1_048_575
_MOST_NUMBER = 10**15  # beyond, Excel changes digits
_NO_SHEET_NAME = re.compile(r"[\[\]:*?/\\\x00-\x1f]")
_COLOURS = ("F6D365", "A8D5A2", "A9CCE3", "D7DBDD", "E6B0AA")  # of tiers, the best first
_WIDTHS = {"picture": 14, "file": 40, "files": 60, "applicant": 20, "image_id": 24}


def check_workbook_path(path: Path) -> None:
    """Refuse a place where no workbook can be written, before anything is computed.

    Raises:
        DataError: it has another kind of file's ending, or is a folder.
    """
    if path.suffix.lower() != ".xlsx":
        raise DataError(f"--xlsx {path}: an Excel workbook is called {path.stem or 'ranking'}.xlsx")
    if path.is_dir():
        raise DataError(f"--xlsx {path} is a folder; name a file, such as {path / 'ranking.xlsx'}")


def write_workbook(
    path: Path,
    ranking: pd.DataFrame,
    files: Sequence[Path],
    config: Config,
    *,
    sheets_by: str | None = None,
    applicants: pd.DataFrame | None = None,
    within: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a ranking as an Excel workbook.

    Text that came with the works is never a formula; numbers among it are numbers where Excel would show
    them as they were written. What is unknown is empty.

    Args:
        path: the workbook; replaced if it exists.
        ranking: the sorted works, see :func:`mirip_fast.portfolio.ranking.rank_scores`.
        files: [n] the works' pictures; one that cannot be read has no small copy.
        config: embed.workers is used.
        sheets_by: a column; each of its values gets a sheet of its own after that of all works. Applicants'
            are in the applicants' order.
        applicants: of :func:`mirip_fast.portfolio.ranking.rank_applicants`; they get a sheet before that of
            all works, with the picture of each one's best work.
        within: name of the column inside whose values they are ranked.
        progress: called with pictures done and their total.

    Returns:
        ``path``.

    Raises:
        DataError: there is no such column, or it has more values than a workbook should have sheets.
    """
    import openpyxl

    parts = _parts(ranking, sheets_by)
    pictures: list[bytes] = []
    workers = min(len(files), default_workers(config.embed.workers))
    for jpeg in make_thumbnails(files, _SIDE, workers=workers, kind="JPEG"):
        pictures.append(jpeg)
        progress(len(pictures), len(files))
    book = openpyxl.Workbook(write_only=True)
    taken = {"history"}  # a name that Excel keeps for itself
    if applicants is not None:
        people = applicants.rename(columns={"within": str(within)})
        place = {name: i for i, name in enumerate(ranking["file"])}
        best = [pictures[place[own[0]]] for own in people["files"]]
        people = people.assign(files=people["files"].map("; ".join))
        _fill(book.create_sheet(_sheet_name("applicants", taken)), people, best)
    for name, rows in parts:
        sheet = book.create_sheet(_sheet_name(name, taken))
        _fill(sheet, ranking.iloc[rows], [pictures[i] for i in rows])
    write_atomically(path, book.save)
    return path


def _parts(ranking: pd.DataFrame, by: str | None) -> list[tuple[str, NDArray[np.int64]]]:
    """Sheets: name and places in the ranking, that of all works first."""
    parts = [("ranking", np.arange(len(ranking)))]
    if len(ranking) > _MOST_ROWS:
        raise DataError(
            f"A sheet has {_MOST_ROWS:,} rows; {len(ranking):,} works are in ranking.csv"
        )
    if by is None:
        return parts
    columns = [str(column) for column in ranking.columns]
    if by not in columns:
        close = closest(by, columns)
        raise DataError(
            f"--sheets-by {by}: no such column."
            + (f" Did you mean {close!r}?" if close else "")
            + f" There are: {header_text(columns)}"
        )
    values = ranking[by].where(ranking[by].notna(), "").astype(str).str.strip()
    if values.nunique() > _MOST_SHEETS:
        raise DataError(
            f"--sheets-by {by}: {values.nunique():,} values, and more than {_MOST_SHEETS} sheets cannot be "
            "found one's way in; name a column with fewer"
        )
    places = dict(zip(*members_of(values.tolist()), strict=True))
    if "applicant_rank" in ranking and values.equals(ranking["applicant"].fillna("").astype(str)):
        best = ranking["applicant_rank"].fillna(_MOST_ROWS)
        places = dict(sorted(places.items(), key=lambda part: best.iloc[part[1][0]]))
    return [*parts, *((value or f"without {by}", rows) for value, rows in places.items())]


def _sheet_name(text: str, taken: set[str]) -> str:
    """A name that Excel takes: 31 signs, some forbidden, none twice whatever its case; added to ``taken``."""
    plain = _NO_SHEET_NAME.sub("_", legal_text(text)).strip("' ") or "_"
    name, number = plain[:31].rstrip("' "), 1
    while name.casefold() in taken:
        number += 1
        end = f" ({number})"
        name = plain[: 31 - len(end)] + end
    taken.add(name.casefold())
    return name


def legal_text(text: str) -> str:
    """Text without signs that no workbook holds: control characters, bytes of names that are no UTF-8."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    return str(ILLEGAL_CHARACTERS_RE.sub("�", os.fsencode(text).decode("utf-8", "replace")))


def _fill(sheet: Any, ranking: pd.DataFrame, pictures: Sequence[bytes]) -> None:
    from openpyxl.utils import get_column_letter

    columns = ["rank", "picture", *(c for c in map(str, ranking.columns) if c != "rank")]
    works = "image_id" in columns  # else applicants
    own = set(columns) - set(given_columns(ranking) if works else ())
    chances = list(of_tiers(ranking, "p")) if works else []
    fills = {
        tier: _COLOURS[round(i * 4 / max(1, len(chances) - 1))] for i, tier in enumerate(chances)
    }
    shapes = dict.fromkeys((c for c in own if c.startswith(("p_", "wins_"))), "0%")
    shapes |= {"score_100": "0"} | dict.fromkeys(("score", "score_sd", "view_spread"), "0.0000")
    for place, name in enumerate(columns, 1):  # before the rows, which are written at once
        sheet.column_dimensions[get_column_letter(place)].width = _WIDTHS.get(name, 11)
    for number in range(2, len(ranking) + 2):
        sheet.row_dimensions[number].height = 76  # points, 101 pixels
    sheet.freeze_panes = "C2"
    sheet.auto_filter.ref = f"A1:{get_column_letter(len(columns))}{len(ranking) + 1}"
    style = functools.cache(functools.partial(_style, sheet))
    sheet.append([_cell(sheet, name, style, bold=True) for name in columns])
    texts = [c for c in columns[2:] if c not in own or c in ("file", "image_id")]
    for row in ranking.to_dict("records"):
        row |= {name: _number(row[name]) for name in texts}
        looks = {"tier": fills.get(str(row.get("tier")))}
        cells = ((row.get(name), shapes.get(name), looks.get(name)) for name in columns)
        sheet.append([_cell(sheet, value, style, shape, fill) for value, shape, fill in cells])
    for number, jpeg in enumerate(pictures, start=2):
        if jpeg:
            sheet.add_image(_drawing(jpeg, number))


def _style(sheet: Any, shape: str | None, fill: str | None, bold: bool, quoted: bool) -> Any:
    """What openpyxl keeps of a look; made once, as each of its parts is costly to set."""
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.styles import Alignment, Font, PatternFill

    cell = WriteOnlyCell(sheet)
    cell.font, cell.alignment = Font(bold=bold), Alignment(vertical=None if bold else "center")
    cell.number_format, cell.quotePrefix = shape or "General", quoted
    if fill:
        cell.fill = PatternFill("solid", fgColor=fill)
    return cell._style


def _cell(
    sheet: Any, value: Any, style: Callable[..., Any],
    shape: str | None = None, fill: str | None = None, bold: bool = False,
) -> Any:  # fmt: skip
    """A cell; text stays text, also where it begins like a formula."""
    from openpyxl.cell import WriteOnlyCell

    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        value = "yes" if value else "no"
    text = isinstance(value, str)
    cell = WriteOnlyCell(sheet, legal_text(value) if text else value)
    if text:
        cell.data_type = "s"
    cell._style = style(shape, fill, bold, text and value.startswith(("=", "+", "-", "@")))
    return cell


def _number(value: Any) -> Any:
    """A number where a text is one that Excel shows as it is written; 00123 and 1.0 stay texts."""
    for kind in (int, float):
        try:
            number = kind(value)
        except (TypeError, ValueError):
            continue
        if str(number) == value and abs(number) < _MOST_NUMBER:
            return number
    return value


def _drawing(jpeg: bytes, row: int) -> Any:
    """A picture in column B; it moves with its cell when rows are sorted, and hides with it."""
    from openpyxl.drawing.image import Image as Drawing
    from openpyxl.drawing.spreadsheet_drawing import AnchorMarker, TwoCellAnchor

    picture = Drawing(io.BytesIO(jpeg))
    left = 2 + (_SIDE - picture.width) // 2
    top = 2 + (_SIDE - picture.height) // 2
    ends = [
        AnchorMarker(col=1, colOff=x * _EMU, row=row - 1, rowOff=y * _EMU)
        for x, y in ((left, top), (left + picture.width, top + picture.height))
    ]
    picture.anchor = TwoCellAnchor(editAs="twoCell", _from=ends[0], to=ends[1])
    return picture
