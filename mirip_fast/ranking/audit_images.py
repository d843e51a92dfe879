"""What an audit looks at: a data set's images with today's grades, what became of them, their splits."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import DataConfig
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.locate import FileFinder
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.records import DataOptions, Record
from mirip_fast.data.remote import is_remote
from mirip_fast.data.source_lists import is_there
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.data.splits import SPLITS
from mirip_fast.errors import ImageError, RunNotFoundError
from mirip_fast.features.datasets import Dataset
from mirip_fast.features.phase_one import open_hashes
from mirip_fast.ranking.findings import Finding
from mirip_fast.ranking.graded import load_split
from mirip_fast.training.run_folder import SPLIT_FILE, Run, find_runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditImage:
    """One image that was embedded.

    Attributes:
        record: its name, file and grades, as the data reads now.
        sha256: of the bytes whose features are in the cache.
        tier: name of its tier, None without a grade.
        split: train, val or test; None where it is in none.
    """

    record: Record
    sha256: bytes
    tier: str | None
    split: str | None = None


def look_at(dataset: Dataset, cache_dir: Path) -> tuple[list[AuditImage], list[Finding]]:
    """The embedded images of a data set, and what is wrong with its files.

    Args:
        dataset: an embedded data set; its folder or CSV file is read again where it is still there.
        cache_dir: where content hashes are remembered.

    Raises:
        DataError: the CSV file is faulty.
    """
    info = dataset.info
    entries = {entry.record.path: entry for entry in dataset.entries()}
    records = _current_records(dataset)
    findings: list[Finding] = []
    images = []
    for record in records:
        entry = entries.get(record.path)
        tier = None if record.tier is None else list(info["tiers"])[record.tier]
        sha256 = None if entry is None else entry.outcome.sha256
        image = AuditImage(record, sha256 or b"", tier)
        if entry is None:
            advice = f"run `mirip-fast embed {shown(dataset.source)}` again"
            findings.append(finding_about("not-embedded", [image], advice))
        elif entry.outcome.status == "failed" or sha256 is None:
            advice = "mend or replace the file; it is left out of training and ranking"
            reason = entry.outcome.reason or ""
            findings.append(finding_about("unreadable", [image], advice, reason))
        else:
            images.append(image)
    return images, findings + _gone_or_changed(images, cache_dir, dataset)


def _current_records(dataset: Dataset) -> list[Record]:
    """The data's records as its source reads now; those of the ledger where it can not be read."""
    kept = [entry.record for entry in dataset.entries()]
    keep_indexes_in(dataset.store_path.parent)
    if not is_there(dataset.source):
        why = "lies at an address" if is_remote(dataset.source) else "is gone"
        log.warning("%s %s: the grades kept in the cache are audited", shown(dataset.source), why)
        return kept
    info = dataset.info
    manifest = read_manifest(dataset.source, DataOptions.from_config(DataConfig(**info["data"])))
    records = list(manifest.records)
    if info["limit"]:
        records = records[: info["limit"]]
    from_folder = os.path.isdir(dataset.source)  # noqa: PTH112 - a list of tars is longer than names may be
    if from_folder and all(record.row is None for record in records):
        known = {record.path for record in records}  # a folder's list lacks the files that are gone
        records += [record for record in kept if record.path not in known]
    return records


def _gone_or_changed(
    images: Sequence[AuditImage], cache_dir: Path, dataset: Dataset
) -> list[Finding]:
    finder = FileFinder()
    there = [finder.exists(image.record.path) for image in images]
    present = [image for image, found in zip(images, there, strict=True) if found]
    with open_hashes(cache_dir) as hashes:
        now = list(hashes.sha256_many([image.record.path for image in present]))
    findings = [
        finding_about("missing", [image], "put the file back, or take its row out")
        for image, found in zip(images, there, strict=True)
        if not found
    ]
    again = f"run `mirip-fast embed {shown(dataset.source)}` again, and train again"
    for image, sha in zip(present, now, strict=True):
        if isinstance(sha, ImageError):
            findings.append(
                finding_about("unreadable", [image], "mend or replace the file", str(sha))
            )
        elif sha != image.sha256:
            findings.append(finding_about("changed", [image], again))
    return findings


def finding_about(
    kind: str, images: Sequence[AuditImage], advice: str, value: str = "", weight: float = 0.0
) -> Finding:
    """A finding about images, with all that is known of them."""
    return Finding(
        kind,
        images=[image.record.image_id for image in images],
        advice=advice,
        rows=[image.record.row for image in images if image.record.row is not None],
        splits=[image.split or "-" for image in images] if any(i.split for i in images) else [],
        tiers=[image.tier or "-" for image in images] if any(i.tier for i in images) else [],
        value=value,
        paths=[image.record.path for image in images],
        weight=weight,
    )


def run_of(dataset: Dataset, output_dir: Path, run: Path | None) -> Run | None:
    """The run that ``run`` names, else the newest finished one that was trained on the data set.

    Raises:
        RunNotFoundError: ``run`` is no run.
    """
    if run is not None:
        folder = run if run.is_dir() else run.parent
        if not Run(folder).has(SPLIT_FILE):
            raise RunNotFoundError(f"--run {run}: there is no {folder / SPLIT_FILE}")
        return Run(folder)
    for found in find_runs(output_dir):
        info = found.info
        trained = info.get("status") == "finished" and not info.get("debug")
        if trained and info.get("dataset") == str(dataset.source):
            return found
    return None


def with_splits(
    images: Sequence[AuditImage], dataset: Dataset, run: Run | None
) -> tuple[list[AuditImage], str | None]:
    """Say which split each image is in: as the run trained, else as the files of `split` say.

    Returns:
        The images, and the file or files where the splits stand; None where there are none.

    Raises:
        DataError: these files are damaged.
    """
    info = dataset.info
    data = DataConfig(**info["data"])
    split_of: dict[str, str] = {}
    where: str | None = None
    if run is not None:
        path = run.path / SPLIT_FILE
        known = load_split(path, info["tiers"], data)
        pairs = zip(known.manifest.records, known.splits, strict=True)
        split_of = {record.image_id: split for record, split in pairs}
        where = str(path)
    else:
        files = {name: Path(info["root"]) / f"{name}_metadata.csv" for name in SPLITS}
        files = {name: path for name, path in files.items() if path.is_file()}
        for name, path in files.items():
            for record in read_manifest(path, DataOptions.from_config(data)).records:
                split_of[record.image_id] = name
        where = ", ".join(map(str, files.values())) or None
    found = [dataclasses.replace(i, split=split_of.get(i.record.image_id)) for i in images]
    return found, where
