"""The table of images: a pandas DataFrame, a row per image; all that steps tell each other of images.

Columns (:data:`COLUMNS`), as far as a step knows them; all others are the user's own, as they came:

- ``image_id``: its name, unique in a data set;
- ``file``: where it is (an absolute path, below a tar, or an address), or was expected if it is missing;
- ``named``: the file as its CSV file names it, or relative to the folder; empty where that is not kept;
- ``sha256``: 32 bytes, of the file's content; None where it could not be read;
- ``status``: what became of it when it was embedded; ``reason``: why that failed;
- ``tier``: a category; the first of the categories is the best tier. Several graders have a column
  ``tier_<grader>`` each (:mod:`mirip_fast.data.graders`), which counts as the user's own;
- ``tier_score``: float64, a grade finer than the tier, higher is better;
- ``group``: images with the same group stay in one split;
- ``split``: train, val or test; ``near_group``: its group of near duplicates;
- ``row``: int64, line in the CSV file, 1-based; 0 without one.

What is unknown is NaN in ``tier`` and ``tier_score``, else None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import DataConfig
from mirip_fast.data.locate import FileFinder
from mirip_fast.data.spreadsheets import Problems
from mirip_fast.files import read_csv, write_csv
from mirip_fast.text import address, counted, folded, nfc, path_of, shown

if TYPE_CHECKING:
    import pandas as pd

#: The columns that have a meaning, in the order of the files.
COLUMNS = (
    "image_id", "file", "named", "status", "reason", "split", "tier", "tier_score", "group", "near_group",
    "row", "sha256",
)  # fmt: skip
#: What becomes of an image that is embedded; each has exactly one.
STATUSES = ("embedded", "present", "duplicate", "failed")

_GIVEN = "given_"
_MISSING_SHOWN = 10


def image_table(columns: Mapping[str, Sequence[Any]], tiers: Sequence[str]) -> pd.DataFrame:
    """A table of images.

    Args:
        columns: [n] values per column; ``image_id`` and ``file`` at least. Tiers are numbers that count into
            ``tiers``, or None.
        tiers: names of the tiers, best first.
    """
    import pandas as pd

    n = len(columns["image_id"])
    scores = np.array(columns.get("tier_score", [None] * n), np.float64)
    usual = {
        "named": [""] * n,
        "tier": tier_column(columns.get("tier", [None] * n), tiers),
        "tier_score": scores,
        "group": [None] * n,
        "row": np.array(columns.get("row", [0] * n), np.int64),
    }
    known = {
        **usual,
        **{k: v for k, v in columns.items() if k not in ("tier", "tier_score", "row")},
    }
    order = [*(name for name in COLUMNS if name in known), *(k for k in known if k not in COLUMNS)]
    # Texts as objects: names of files that are no UTF-8 have no other form.
    return pd.DataFrame(
        {
            k: pd.Series(known[k], dtype=object) if isinstance(known[k], Sequence) else known[k]
            for k in order
        }
    )


def tier_reader(tiers: Sequence[str]) -> Callable[[str], int | None]:
    """What finds a tier by its name: the number, 0 is the best, or None for an unknown one.

    A name counts as it is written, else but for case, blanks and width where only one tier is called so.
    Tables that went through a float column say 1.0 where the tier is 1.
    """
    exact = {nfc(name): number for number, name in enumerate(tiers)}
    loose = [folded(name) for name in tiers]
    alike = {name: number for number, name in enumerate(loose) if loose.count(name) == 1}

    def number(name: str) -> int | None:
        found = exact.get(nfc(name))
        if found is not None:
            return found
        plain = folded(name)
        return alike.get(plain, alike.get(plain.removesuffix(".0")))

    return number


def tier_column(numbers: Sequence[int | None], tiers: Sequence[str]) -> pd.Categorical[Any]:
    """Tiers that count into ``tiers``, or None, as a column of a table."""
    import pandas as pd

    codes = np.array([-1 if number is None else number for number in numbers], np.int64)
    names = pd.CategoricalDtype(pd.Series(list(tiers), dtype=object), ordered=True)
    return pd.Categorical.from_codes(codes, dtype=names)


def or_none(column: pd.Series[Any]) -> list[Any]:
    """[n] values of a column, None where it has none."""
    return column.astype(object).where(column.notna(), None).tolist()


def own_column(name: str) -> str:
    """The column that holds the user's column ``name``: ``given_tier`` where it is called tier."""
    return _GIVEN + name if _bare(name) in COLUMNS else name


def given_name(column: str) -> str:
    """What the user called the column; undoes :func:`own_column`."""
    return column.removeprefix(_GIVEN) if _bare(column) in COLUMNS else column


def _bare(name: str) -> str:
    while name.startswith(_GIVEN):
        name = name.removeprefix(_GIVEN)
    return name


def own_columns(table: pd.DataFrame) -> list[str]:
    """The columns that are the user's own and that any image has, in the order they came."""
    own = [str(column) for column in table.columns if column not in COLUMNS]
    return [column for column in own if table[column].notna().any()]


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other; an image without another's own column has None there."""
    import pandas as pd

    whole = pd.concat(tables, ignore_index=True)
    texts = whole.columns[whole.dtypes == np.dtype(object)]
    whole[texts] = whole[texts].where(whole[texts].notna(), None)
    return whole


def write_images(path: Path, table: pd.DataFrame) -> None:
    """Write a table that :func:`read_images` gives back, but for ``named``.

    Raises:
        DiskFullError: there is no room.
    """
    columns = [c for c in COLUMNS if c in table.columns and c != "named"] + own_columns(table)
    text: dict[
        str, Callable[[Any], object]
    ] = {  # made row by row: it takes more memory than the table
        "file": lambda file: address(Path(file)),
        "row": lambda row: row or None,
        "sha256": lambda sha: sha.hex() if sha else None,
    }
    cells = (map(text.get(c, lambda cell: cell), or_none(table[c])) for c in columns)
    rows = zip(*cells, strict=True)
    write_csv(path, columns, (dict(zip(columns, row, strict=True)) for row in rows))


def read_images(path: Path, tiers: Sequence[str], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read what :func:`write_images` wrote, or an older version; nothing in it is trusted.

    Args:
        path: the file.
        tiers: names of the tiers, best first.
        columns: those that it must have, beside ``image_id``, ``file``, the grades and ``sha256``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; names the first image that is.
    """
    rows = read_csv(path)
    if rows and "file" not in rows[0]:
        rows = _of_older_version(rows)
    need = ("image_id", "file", "tier", "tier_score", "group", "sha256", *columns)
    lacking = [name for name in need if rows and name not in rows[0]]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}")
    number = {"": None} | {name: i for i, name in enumerate(tiers)}
    values: dict[str, list[Any]] = {name: [] for name in dict.fromkeys(k for r in rows for k in r)}
    values |= {name: [] for name in need if name not in values}
    for row in rows:
        try:
            for name, made in values.items():
                text = row.get(name)
                if name == "file":
                    made.append(str(path_of(text or "")))
                elif name == "tier":
                    made.append(number[text or ""])
                elif name == "tier_score":
                    made.append(float(text) if text else None)
                elif name == "row":
                    made.append(int(text or 0))
                elif name == "sha256":
                    made.append(_content_hash(text or "", row.get("status")))
                elif name in COLUMNS and name != "image_id":
                    made.append(text or None)
                else:
                    made.append(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{row['image_id']}: {name} {text!r}") from error
    return image_table(values, tiers)


def _content_hash(text: str, status: str | None) -> bytes | None:
    sha256 = bytes.fromhex(text)
    if len(sha256) != 32 and (sha256 or status != "failed"):
        raise ValueError("no content hash")
    if status not in (None, *STATUSES):
        raise ValueError("no such status")
    return sha256 or None


def _of_older_version(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Lines with ``path`` and all the user's own columns as JSON in ``extra``, as lines of today."""
    made = []
    for row in rows:
        extra = json.loads(row["extra"]) if row.get("extra") else {}
        own = {own_column(name): text for name, text in extra.items()}
        named = {("file" if k == "path" else k): v for k, v in row.items() if k != "extra"}
        made.append(named | own)
    return made


class _Paths(Sequence[Path]):
    """Files as paths, each made when it is asked for: a path takes ten times the memory of its name."""

    def __init__(self, files: list[str]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> _Paths: ...

    def __getitem__(self, index: int | slice) -> Path | _Paths:
        if isinstance(index, slice):
            return _Paths(self._files[index])
        return Path(self._files[index])


@dataclass(frozen=True, eq=False)
class Manifest:
    """The images of a data set, in the order of its rows (a folder: sorted by path).

    Attributes:
        source: the CSV file, or the folder where there is none; absolute.
        root: the folder that file names are relative to; absolute.
        tiers: names of the tiers, best first.
        table: a row per image; see :mod:`mirip_fast.data.table`.
        options: how the source spells its columns; files written from it are spelled the same.
        places: folders that file names were looked up in, in this order.
    """

    source: Path
    root: Path
    tiers: tuple[str, ...]
    table: pd.DataFrame
    options: DataConfig = field(default_factory=DataConfig)
    places: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def ids(self) -> list[str]:
        """[n] image ids."""
        return self.table["image_id"].tolist()

    @property
    def paths(self) -> Sequence[Path]:
        """[n] image files."""
        return _Paths(self.table["file"].tolist())

    @property
    def names(self) -> list[str]:
        """[n] what the source calls the files; ids where that is not kept."""
        named = zip(self.table["named"], self.ids, strict=True)
        return [name or image_id for name, image_id in named]

    @property
    def tier_codes(self) -> NDArray[np.int64]:
        """[n] tier of each image, 0 is the best; −1 without one."""
        return np.array(self.table["tier"].cat.codes, dtype=np.int64)

    @property
    def tier_scores(self) -> list[float | None]:
        """[n] finer grade of each image; None without one."""
        return or_none(self.table["tier_score"])

    @property
    def groups(self) -> list[str | None]:
        """[n] group of each image; None without one."""
        return self.table["group"].tolist()

    @property
    def has_grades(self) -> bool:
        """Whether every image has a tier and at least two tiers occur."""
        return bool(self.table["tier"].notna().all()) and self.table["tier"].nunique() >= 2

    @property
    def has_scores(self) -> bool:
        """Whether no image has a tier, but every one a finer grade, of which at least two differ."""
        scores = self.table["tier_score"]
        no_tiers = bool(self.table["tier"].isna().all())
        return no_tiers and bool(scores.notna().all()) and scores.nunique() >= 2

    def tier_counts(self) -> dict[str, int]:
        """How many images each tier has, best tier first; tiers without images are in it."""
        codes = self.tier_codes
        counts = np.bincount(codes[codes >= 0], minlength=len(self.tiers)).tolist()
        return dict(zip(self.tiers, counts, strict=True))

    def without_tiers(self) -> Manifest:
        """The same images, with their tiers forgotten."""
        forgotten = self.table["tier"].where(np.zeros(len(self), bool))
        return replace(self, table=self.table.assign(tier=forgotten))

    def subset(self, indexes: Iterable[int]) -> Manifest:
        """A manifest of the images with these indexes, in the order given."""
        some = self.table.iloc[[int(index) for index in indexes]]
        return replace(self, table=some.reset_index(drop=True))

    def missing(self) -> Manifest:
        """The images whose file is not there (each folder is listed once)."""
        finder = FileFinder()
        gone = (i for i, path in enumerate(self.paths) if not finder.exists(path))
        return self.subset(gone)

    def require_files(self) -> None:
        """Refuse to go on when image files are missing.

        Raises:
            DataError: names the rows, the files and the folders that were looked in.
        """
        missing = self.missing()
        if not len(missing):
            return
        problems = Problems(self.source, _MISSING_SHOWN, self.options.sheet)
        finder = FileFinder(self.places or (self.root,))
        rows = zip(*(missing.table[column] for column in ("named", "file", "row")), strict=True)
        for number, (named, file, row) in enumerate(rows):
            name = named or file
            close = finder.suggest(name) if number < _MISSING_SHOWN else ""
            problems.add(
                f"no such file: {name!r}.{close}", row=row or None, column=self.image_column
            )
        total = f"{len(missing):,} of {counted(len(self), 'image')}"
        places = ", ".join(shown(place) for place in self.places) or shown(self.root)
        problems.hint(
            f"{total} missing; looked in {places}. Correct the names, add the files, take the rows "
            "out, or give the folder with --image-root."
        )
        problems.raise_if_any()

    @property
    def image_column(self) -> str:
        """The column that names the image files."""
        return self.options.image_column or "filename"
