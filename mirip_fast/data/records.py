"""What is known about the images of a data set: options, one record per image, the whole list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mirip_fast.config import DataConfig
from mirip_fast.data.csv_reader import Problems, counted, shown
from mirip_fast.data.locate import FileFinder
from mirip_fast.errors import ConfigError
from mirip_fast.text import nfc

_MISSING_SHOWN = 10


@dataclass(frozen=True)
class DataOptions:
    """How a data set spells its columns and tiers.

    Attributes:
        tiers: names of the tiers, best first.
        id_column: column with the image's own name; without it the file name is the name.
        image_column: column with the image file; ``None`` takes ``filename``, else ``image_path``.
        tier_column: column with the tier.
        score_column: column with a grade finer than the tier (a number, higher is better).
        group_column: column naming images that must stay in one split.
        image_root: folder that image files are relative to, before the CSV's own folder; files outside of
            both are refused.
        separator: between cells; ``None`` finds it out.
        encoding: of the CSV file; utf-8 with or without a byte order mark.
        with_grades: whether tiers, scores and groups are read; without, their columns are like any other.
        encoding_errors: ``surrogateescape`` reads files with file names that are no UTF-8, as
            :func:`write_manifest_csv` writes them; ``strict`` refuses such a file.

    Raises:
        ConfigError: no tiers, an empty tier name, or one twice.
    """

    tiers: tuple[str, ...] = ("S", "A", "B", "C")
    id_column: str = "image_id"
    image_column: str | None = None
    tier_column: str = "tier"
    score_column: str = "tier_score"
    group_column: str = "group"
    image_root: Path | None = None
    separator: str | None = None
    encoding: str = "utf-8"
    with_grades: bool = True
    encoding_errors: str = "strict"

    def __post_init__(self) -> None:
        if not self.tiers or not all(self.tiers) or len(set(self.tiers)) < len(self.tiers):
            raise ConfigError(
                f"--tiers {','.join(self.tiers)!r}: different names are expected, best first, "
                "separated by commas, such as S,A,B,C"
            )

    @classmethod
    def from_config(cls, config: DataConfig) -> DataOptions:
        """The options that the settings under ``data:`` ask for."""
        return cls(
            tiers=tuple(config.tier_names()),
            id_column=nfc(config.id_column),
            image_column=None if config.image_column is None else nfc(config.image_column),
            tier_column=nfc(config.tier_column),
            score_column=nfc(config.score_column),
            group_column=nfc(config.group_column),
            image_root=None if config.image_root is None else Path(config.image_root),
            separator={"tab": "\t", "\\t": "\t"}.get(config.separator or "", config.separator),
            encoding=config.encoding,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set.

    Attributes:
        image_id: its name, unique in the manifest.
        path: where the file is, absolute; where it was expected if it is missing.
        tier: 0 for the best tier, larger is worse; ``None`` without a grade.
        tier_score: a finer grade, higher is better.
        group: images with the same group stay in one split.
        extra: further columns of the CSV file, as written.
        row: line in the CSV file, 1-based; ``None`` for a folder without one.
        filename: the file as the CSV names it, or relative to the folder.
    """

    image_id: str
    path: Path
    tier: int | None = None
    tier_score: float | None = None
    group: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    row: int | None = None
    filename: str = ""


@dataclass(frozen=True)
class Manifest:
    """The images of a data set, in the order of its rows (a folder: sorted by path).

    Attributes:
        source: the CSV file, or the folder where there is none; absolute.
        root: the folder that file names are relative to; absolute.
        tiers: names of the tiers, best first; ``Record.tier`` counts into them.
        records: one per image; many are packed and made when looked at
            (:class:`mirip_fast.data.packed_records.PackedRecords`).
        options: how the source spells its columns; files written from it are spelled the same.
        places: folders that file names were looked up in, in this order.
    """

    source: Path
    root: Path
    tiers: tuple[str, ...]
    records: Sequence[Record]
    options: DataOptions = DataOptions()
    places: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def has_grades(self) -> bool:
        """Whether every image has a tier and at least two tiers occur."""
        tiers = {record.tier for record in self.records}
        return None not in tiers and len(tiers) >= 2

    @property
    def has_scores(self) -> bool:
        """Whether no image has a tier, but every one a finer grade, of which at least two differ."""
        scores = {record.tier_score for record in self.records if record.tier is None}
        return None not in scores and len(scores) >= 2 and not any(self.tier_counts().values())

    def tier_counts(self) -> dict[str, int]:
        """How many images each tier has, best tier first; tiers without images are in it."""
        counts = Counter(record.tier for record in self.records)
        return {name: counts[index] for index, name in enumerate(self.tiers)}

    def first(self, count: int) -> Manifest:
        """A manifest of the first ``count`` records, packed as they are."""
        return replace(self, records=self.records[:count])

    def subset(self, indexes: Iterable[int]) -> Manifest:
        """A manifest of the records with these indexes, in the order given; a tuple, quick to look at."""
        return replace(self, records=tuple(self.records[int(index)] for index in indexes))

    def missing(self) -> list[Record]:
        """The records whose file is not there (each folder is listed once)."""
        finder = FileFinder()
        return [record for record in self.records if not finder.exists(record.path)]

    def require_files(self) -> None:
        """Refuse to go on when image files are missing.

        Raises:
            DataError: names the rows, the files and the folders that were looked in.
        """
        missing = self.missing()
        if not missing:
            return
        problems = Problems(self.source, limit=_MISSING_SHOWN)
        finder = FileFinder(self.places or (self.root,))
        for number, record in enumerate(missing):
            name = record.filename or str(record.path)
            close = finder.suggest(name) if number < _MISSING_SHOWN else ""
            problems.add(
                f"no such file: {name!r}.{close}", row=record.row, column=self.image_column
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

    def columns(self) -> list[str]:
        """The columns that a CSV file of these records needs, in order."""
        options, records = self.options, self.records
        default = DataOptions()  # a column asked for by name has to be there when read again
        optional = (
            (options.tier_column, default.tier_column, any(r.tier is not None for r in records)),
            (
                options.score_column,
                default.score_column,
                any(r.tier_score is not None for r in records),
            ),
            (options.group_column, default.group_column, any(r.group is not None for r in records)),
        )
        used = [name for name, usual, has_values in optional if has_values or name != usual]
        extra = [name for record in records for name in record.extra]
        return list(dict.fromkeys([options.id_column, self.image_column, *used, *extra]))

    def to_rows(self) -> list[dict[str, object]]:
        """The records as CSV rows under the source's own column names; ``None`` where empty."""
        options = self.options
        return [
            {
                **record.extra,
                options.id_column: record.image_id,
                self.image_column: record.filename or str(record.path),
                options.tier_column: None if record.tier is None else self.tiers[record.tier],
                options.score_column: record.tier_score,
                options.group_column: record.group,
            }
            for record in self.records
        ]
