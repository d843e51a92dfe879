"""Looking after caches: what they hold, whether they are whole, repair, prune, merge, export.

Nothing here trusts a file. A crash at any point loses no row that a data set uses: rows that stay are copied
into new shards, which count from one step on, and only then are the old ones deleted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import MiripError, RunNotFoundError, StoreError
from mirip_fast.features.canary import (
    CANARY_FILE,
    TOLERANCE,
    changes,
    difference,
    read_canary,
    write_canary,
)
from mirip_fast.features.datasets import (
    Dataset,
    copy_dataset,
    datasets_beside,
    remove_dataset,
    unfinished_datasets,
)
from mirip_fast.features.recipe import layer_of, series_name
from mirip_fast.features.shards import (
    SeriesSpec,
    Shard,
    create_shard,
    open_shard,
    parse_shard_name,
    row_checksums,
    write_export,
)
from mirip_fast.features.store import (
    STORE_FILE,
    FeatureStore,
    Ranges,
    dirty_files,
    listed,
    missing_shards,
    ranges_files,
    read_list,
    read_ranges,
    shard_files,
    write_ranges,
)
from mirip_fast.features.store_writer import StoreLock, StoreWriter, holder_of
from mirip_fast.files import (
    damaged_files,
    format_bytes,
    open_file,
    open_regular,
)

log = logging.getLogger(__name__)

#: Rows that no data set names stay this long: the interrupted run that made them may yet go on.
KEPT_DAYS = 14.0
#: Cosine similarity from which on two rows of one image count as the same: half precision and another
#: batch size stay far above, other weights or another preprocessing far below.
SAME = 0.999
_MOST_FLIPPED = 64  # bits of a content hash that may be wrong for it to be recognised
_TOLD_MISSING = 100
#: The files of a store besides store.json and its locks.
_OWN_FILES = (
    "*.h5", "shards-r*.json", "DIRTY*", ".*.partial", "*.damaged", CANARY_FILE, "neighbours-*.faiss",
)  # fmt: skip


def store_folders(cache_dir: Path) -> list[Path]:
    """The folder of every store below a cache folder.

    Raises:
        RunNotFoundError: there is none.
    """
    found = [folder for folder in listed(cache_dir, "*") if listed(folder, STORE_FILE)]
    if not found:
        raise RunNotFoundError(
            f"No feature store in {cache_dir.resolve()}: run `mirip-fast embed data/` first, or name the "
            "cache folder with --cache-dir."
        )
    return found


def _datasets_of(store: Path) -> tuple[list[Dataset], list[StoreError]]:
    """The data sets beside a store, the newest first, and what is wrong with those that are damaged."""
    good, bad = [], []
    for dataset in datasets_beside(store):
        try:
            good.append((dataset.embedded_at, dataset))
        except StoreError as error:
            bad.append(error)
    return [d for _, d in sorted(good, key=lambda pair: pair[0], reverse=True)], bad


def _used_hashes(datasets: Iterable[Dataset]) -> set[bytes]:
    return {sha for dataset in datasets for sha in dataset.hashes()}


def _folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------- info


def describe_cache(cache_dir: Path) -> list[dict[str, Any]]:
    """What every store below a cache folder holds; a damaged store is told, not raised.

    Returns:
        Of each store ``path``, ``fingerprint`` (its fields), ``series`` (of each ``name``, ``shape``,
        ``dtype``, ``rows`` that exist, ``free`` slots, ``bytes``), ``datasets`` (of each ``source``,
        ``backbone``, ``images`` and ``failed``, ``graded``, ``limit`` of a trial, ``embedded_at``; the newest
        first), ``unused_rows`` of images that no data set names, ``bytes`` on the disk, ``changed`` (when a
        shard was last written to), ``writing`` (who does now) and ``problem`` (why there is no more to tell).

    Raises:
        RunNotFoundError: there is none.
    """
    return [_describe_store(path) for path in store_folders(cache_dir)]


def _describe_store(path: Path) -> dict[str, Any]:
    fingerprint: dict[str, Any] = {}
    series: list[dict[str, Any]] = []
    unused, problem = 0, None
    datasets, damaged = _datasets_of(path)
    try:
        store = FeatureStore.open(path)
        fingerprint = store.fingerprint
        used = None if damaged else list(_used_hashes(datasets))
        for name, spec in store.series().items():
            shards, rows = store.shards(name), store.count(name)
            about = {"name": name, "shape": spec.shape, "dtype": spec.dtype, "rows": rows}
            about["free"] = sum(shard.rows for shard in shards) - rows
            about["bytes"] = sum(shard.path.stat().st_size for shard in shards)
            series.append(about)
            if used is not None:
                unused += rows - int(np.count_nonzero(store.rows(name, used) >= 0))
    except MiripError as error:
        problem = str(error)
    if problem is None and damaged:
        problem = str(damaged[0])
    written = [file.stat().st_mtime for file in listed(path, "*.h5")]
    keys = ("source", "backbone", "images", "failed", "graded", "limit")
    return {
        "path": path,
        "fingerprint": fingerprint,
        "series": series,
        "datasets": [
            {key: d.info[key] for key in keys} | {"embedded_at": d.embedded_at} for d in datasets
        ],
        "unused_rows": unused,
        "bytes": _folder_bytes(path),
        "changed": datetime.fromtimestamp(max(written, default=path.stat().st_mtime)).astimezone(),
        "writing": holder_of(path),
        "problem": problem,
    }


# ------------------------------------------------------------------------------------ verify, repair


@dataclass
class StoreReport:
    """What was found in one store."""

    path: Path
    rows: int = 0  # rows that were checked, damaged ones included
    shards: int = 0
    #: Shard, slot, content hash (where it can be told; else what stands there), and files of that image in
    #: any data set, of each row whose bytes do not match its checksum.
    damaged: list[tuple[Path, int, bytes, tuple[Path, ...]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # missing and unreadable files, a sentence each
    #: Source, images without features (any more), of how many, and what to type, of each such data set.
    lacking: list[tuple[str, int, int, str]] = field(default_factory=list)
    killed: bool = False  # a run was killed while it wrote: the next embed looks after these rows
    writing: str | None = None  # who writes at this moment

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.faults or self.lacking)


def verify_cache(
    cache_dir: Path, progress: Callable[[Path], None] = lambda _: None
) -> list[StoreReport]:
    """Check every store below a cache folder; changes nothing, and never waits for a run.

    Args:
        cache_dir: the cache folder.
        progress: called with each shard when it was checked.

    Raises:
        RunNotFoundError: there is no store.
    """
    return [verify_store(path, progress) for path in store_folders(cache_dir)]


def verify_store(path: Path, progress: Callable[[Path], None] = lambda _: None) -> StoreReport:
    """Check one store: every row against its checksum, every shard, every data set's images."""
    report = StoreReport(path, writing=holder_of(path))
    report.killed = bool(dirty_files(path)) and report.writing is None
    datasets, bad_ledgers = _datasets_of(path)
    report.faults += [str(error) for error in bad_ledgers]
    report.faults += [
        f"{folder} is no data set: a run was stopped while it was written. The next one completes it, and "
        "`mirip-fast cache prune` removes it."
        for folder in unfinished_datasets(path)
    ]
    try:
        store = FeatureStore.open(path)
        files = shard_files(path)
    except StoreError as error:
        report.faults.append(str(error))
        return report
    ranges: Ranges = {}
    try:
        ranges = read_ranges(path)
    except StoreError as error:
        report.faults.append(str(error))
    for number, name in enumerate(missing_shards(ranges, files)):
        if number == _TOLD_MISSING:
            report.faults.append(f"{path} lacks more shards than these")
            break
        report.faults.append(f"{path / name} is missing")
    names: dict[bytes, list[Path]] = {}
    for key, numbers in sorted(files.items()):
        first, _ = ranges.get(key, (0, 0))
        for file in (numbers[number] for number in sorted(numbers) if number >= first):
            try:
                _check_shard(open_shard(file, store.fingerprint_id), datasets, names, report)
            except (StoreError, FileNotFoundError) as error:
                report.faults.append(str(error))
            progress(file)
    _check_datasets(store, datasets, report)
    _check_canary(store, report)
    return report


def _check_shard(
    shard: Shard, datasets: Sequence[Dataset], names: dict[bytes, list[Path]], report: StoreReport
) -> None:
    """Find damaged rows. ``names``, content hash → image files, is read when first needed."""
    with shard.open() as stream:
        before = shard.read_checksums(stream)
        sums, hashes = shard.read_keys(stream)
        good = shard.matching(stream, sums, hashes)
        # A run may have been at work on a row meanwhile: what changed since is not damaged.
        unchanged = before == shard.read_checksums(stream)
    report.shards += 1
    report.rows += int(np.count_nonzero(before))
    damaged = np.flatnonzero((before != 0) & ~good & unchanged).tolist()
    if damaged and not names:
        for dataset in datasets:
            with contextlib.suppress(StoreError):  # told with the data sets
                images = dataset.images()
                for sha256, file in zip(images["sha256"], images["file"], strict=True):
                    if sha256 is not None:
                        known = names.setdefault(sha256, [])
                        if Path(file) not in known:
                            known.append(Path(file))
    for slot in damaged:
        sha = _recognised(shard, slot, hashes[slot], names)
        report.damaged.append((shard.path, slot, sha, tuple(names.get(sha, ()))))


def _recognised(
    shard: Shard, slot: int, found: NDArray[np.uint8], known: Collection[bytes]
) -> bytes:
    """The content hash of a damaged row: as it stands there, or the known one that fits its checksum."""
    if not known or found.tobytes() in known:
        return bytes(found)
    table = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)
    flipped = np.unpackbits(table ^ found, axis=1).sum(axis=1, dtype=np.int64)
    nearest = int(flipped.argmin())
    if flipped[nearest] <= _MOST_FLIPPED:  # two hashes differ in about 128 of 256 bits
        features = np.empty((1, *shard.spec.shape), shard.spec.dtype)
        with shard.open() as stream:
            shard.read_features(stream, slot, features)
            total = shard.read_checksums(stream)[slot]
        if row_checksums(shard.spec.name, table[nearest : nearest + 1], features)[0] == total:
            return bytes(table[nearest])
    return bytes(found)


def _check_canary(store: FeatureStore, report: StoreReport) -> None:
    """Whether the features of the built-in test picture are there and are this store's."""
    file = store.path / CANARY_FILE
    try:
        if not read_canary(file, store.fingerprint_id)[0] and report.rows:
            report.faults.append(
                f"{file} is missing. Put it back; without it `mirip-fast embed` keeps the features that "
                "today's libraries give."
            )
    except StoreError as error:
        report.faults.append(str(error))


def _check_datasets(store: FeatureStore, datasets: Sequence[Dataset], report: StoreReport) -> None:
    """Find the images of data sets that have no features, damaged rows counted in."""
    corrupt = {sha for _, _, sha, _ in report.damaged}
    for dataset in datasets:
        try:
            wanted = sorted(dataset.hashes())
            lacking = np.array([sha in corrupt for sha in wanted], dtype=bool)
            for name in dataset.series():
                lacking |= store.rows(name, wanted) < 0
        except MiripError as error:
            if str(error) not in report.faults:
                report.faults.append(str(error))
            continue
        _, faults = damaged_files(dataset.folder)
        report.faults += [fault for fault in faults if fault not in report.faults]
        if lacking.any():
            source, count = str(dataset.source), int(lacking.sum())
            report.lacking.append((source, count, len(wanted), dataset.embed_command()))


def repair_store(path: Path, *, command: str = "mirip-fast cache verify --repair") -> list[str]:
    """Mark damaged rows as missing, and put an empty shard in the place of each bad or missing one.

    An unreadable file is kept beside it, with ``.damaged`` after its name. Damaged lists of shards are
    written anew from the shards that are there. The next embed computes the rows that are gone.

    Returns:
        A sentence for each thing that was put right.

    Raises:
        StoreLockedError: a run writes to the store; nothing was changed.
        StoreError: a file that cannot be read just now, or that is no shard at all.
    """
    store = FeatureStore.open(path)
    done: list[str] = []
    lock = StoreLock(path, command)
    try:
        ranges = _lists_anew(path, done)
        files = shard_files(path)
        shards: dict[str, list[Shard]] = {}
        for key, numbers in files.items():
            for number, file in list(numbers.items()):
                with contextlib.suppress(ValueError):  # no file at all
                    os.close(open_regular(file))  # one that may not be read is not a damaged one
                try:
                    shards.setdefault(key[0], []).append(open_shard(file, store.fingerprint_id))
                except StoreError as error:
                    aside = file.with_name(f"{file.name}.damaged")
                    file.replace(aside)
                    del numbers[number]
                    first, end = ranges.get(key, (0, 0))
                    ranges[key] = (first, max(end, number + 1))
                    done.append(f"{error}; kept as {aside.name}")
        for name in list(missing_shards(ranges, files)):
            series, part, number = parse_shard_name(name) or ("", 0, 0)
            if shards.get(series):
                create_shard(path / name, shards[series][0].spec, store.fingerprint_id)
                done.append(f"{name} was missing: an empty one is in its place")
            else:  # nothing is left that tells the shape of a row
                end = ranges[series, part][1]
                ranges[series, part] = (end, end)
                done.append(f"{name} was missing, and with it all of series {series}")
        for part in sorted({part for _, part in ranges}):
            write_ranges(path, part, ranges)
    finally:
        lock.release()
    with StoreWriter(store, command=command) as writer:
        for name in store.series():
            writer.missing(name, [])
        if writer.cleared:
            done.append(f"{writer.cleared} damaged rows are marked as missing")
    return done


def _lists_anew(path: Path, done: list[str]) -> Ranges:
    """Which shards there must be; a damaged list is put aside."""
    ranges: Ranges = {}
    rebuilt = set()
    for file in ranges_files(path):
        try:
            ranges |= read_list(file)
        except StoreError:
            file.replace(file.with_name(f"{file.name}.damaged"))
            done.append(f"{file.name} was damaged: the shards beside it are listed anew")
            rebuilt.add(int(file.stem.rpartition("-r")[2]))
    for key, numbers in shard_files(path).items():
        first, end = ranges.get(key, (min(numbers) if key[1] in rebuilt else 0, 0))
        ranges[key] = (first, max([end, *(number + 1 for number in numbers)]))
    return ranges


# --------------------------------------------------------------------------------------------- prune


@dataclass(frozen=True)
class StorePlan:
    """What would become of one store."""

    path: Path
    whole: bool  # no data set uses it: the folder goes
    trials: tuple[Dataset, ...]  # data sets that are forgotten
    kept_trials: int  # trials that stay, because they were not given up
    young: int  # rows that no data set names, too young to go
    kept: int  # rows that stay
    dropped: int  # rows that go
    series: tuple[str, ...]  # series that go as a whole
    leftovers: tuple[Path, ...]  # files of killed runs and repairs
    frees: int  # bytes
    needs: int  # bytes of room needed while it is done
    again: Callable[[], StorePlan] = field(repr=False)  # makes it anew
    keep: frozenset[bytes] = field(repr=False)  # content hashes whose rows stay

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.whole or self.trials or self.dropped or self.leftovers or self.frees > 0)


def plan_prune(
    cache_dir: Path, *, older_than: float = KEPT_DAYS, trials: bool = False, series: bool = False
) -> list[StorePlan]:
    """What pruning would do in every store of a cache; changes nothing.

    What a data set's ledger names is never touched. Rows that no ledger names may belong to a run that was
    interrupted before it wrote its ledger, so those written lately stay.

    Args:
        cache_dir: the cache folder.
        older_than: days since a shard was written to; younger ones keep their rows.
        trials: forget data sets that were embedded with ``--limit``.
        series: drop views and token kinds that no data set lists.

    Raises:
        RunNotFoundError: there is no store.
        StoreError: a store or a ledger is damaged: what it needs cannot be told, so nothing is pruned.
    """
    folders = store_folders(cache_dir)
    return [_plan_store(path, older_than, trials, series) for path in folders]


def _plan_store(path: Path, older_than: float, trials: bool, series: bool) -> StorePlan:
    store = FeatureStore.open(path)
    datasets, damaged = _datasets_of(path)
    if damaged:
        raise StoreError(f"{damaged[0]} Until then nothing in {path} is pruned.")
    gone = [d for d in datasets if trials and d.info["limit"] is not None]
    kept = [dataset for dataset in datasets if dataset not in gone]
    used = _used_hashes(kept)
    keep = used | _young_hashes(store, older_than)
    named = {name for dataset in kept for name in dataset.series()}
    unused = [n for n in store.series() if series and kept and n not in named]
    kept_rows = dropped = too_young = frees = needs = 0
    for name, spec in store.series().items():
        there = store.valid_hashes(name)
        stay = set() if name in unused else there & keep
        kept_rows, dropped = kept_rows + len(stay), dropped + len(there) - len(stay)
        too_young += len(stay - used)
        shards = store.shards(name)
        if len(stay) < len(there) or -(-len(stay) // spec.shard_rows) < len(shards):
            size = -(-len(stay) // spec.shard_rows) * max(s.path.stat().st_size for s in shards)
            frees += sum(shard.path.stat().st_size for shard in shards) - size
            needs = max(needs, size)
    leftovers = tuple(_leftovers(path))
    whole = not kept and not keep
    frees += sum(file.lstat().st_size for file in leftovers)
    frees += sum(_folder_bytes(dataset.folder) for dataset in gone)
    return StorePlan(
        path=path,
        whole=whole,
        trials=tuple(gone),
        kept_trials=sum(dataset.info["limit"] is not None for dataset in kept),
        young=too_young,
        kept=kept_rows,
        dropped=dropped,
        series=tuple(unused),
        leftovers=leftovers,
        frees=_folder_bytes(path) if whole else frees,
        needs=needs,
        again=functools.partial(_plan_store, path, older_than, trials, series),
        keep=frozenset(keep),
    )


def carry_out(plan: StorePlan, *, command: str = "mirip-fast cache prune") -> int:
    """Do what a plan says. What came to be used since the plan was made stays.

    Returns:
        The bytes that were given back.

    Raises:
        DiskFullError: no room for the rows that stay; nothing was changed in that store.
        StoreLockedError: a run writes to the store; nothing was changed.
    """
    path = plan.path
    before = _folder_bytes(path)
    store = FeatureStore.open(path)
    with StoreWriter(store, command=command) as writer:
        now = plan.again()  # under the lock nobody adds rows
        for dataset in now.trials:  # before its rows: a ledger must not name rows that are gone
            remove_dataset(dataset)
        if now.whole:
            _remove_store(path)
            return before - (_folder_bytes(path) if path.exists() else 0)
        for file in now.leftovers:
            file.unlink(missing_ok=True)
        for folder in unfinished_datasets(path):
            shutil.rmtree(folder, ignore_errors=True)
        prune_rows(writer, now.keep, now.series)
    return before - _folder_bytes(path)


def prune_rows(writer: StoreWriter, keep: Collection[bytes], unwanted: Collection[str]) -> None:
    """Drop every row whose content hash is not in ``keep``, second rows of one picture, damaged rows.

    Args:
        writer: of the store.
        keep: content hashes whose rows stay.
        unwanted: series that go as a whole.

    Raises:
        DiskFullError: no room for the rows that are kept; nothing was changed.
    """
    checked = FeatureStore.open(writer.store.path, verify=True)
    for name, spec in checked.series().items():
        valid = checked.valid_hashes(name)
        wanted = [] if name in unwanted else sorted(valid.intersection(keep))
        needed = -(-len(wanted) // spec.shard_rows)
        if len(wanted) < len(valid) or needed < len(checked.shards(name)):
            writer.rewrite(checked, name, wanted)
    writer.store.refresh()


def _young_hashes(store: FeatureStore, days: float) -> set[bytes]:
    """The content hashes of every row in a shard that was written to lately."""
    oldest = time.time() - days * 86_400
    young: set[bytes] = set()
    for name in store.series():
        for shard in store.shards(name):
            if days > 0 and shard.path.stat().st_mtime > oldest:
                with shard.open() as stream:
                    sums, hashes = shard.read_keys(stream)
                young.update(row.tobytes() for row in hashes[sums != 0])
    return young


def _leftovers(path: Path) -> list[Path]:
    """Files that killed runs and repairs left; opening the store for writing deletes the rest."""
    found = [*listed(path, ".*.partial"), *listed(path, "*.damaged")]
    for folder in unfinished_datasets(path):
        found += [file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()]
    ranges = read_ranges(path)
    for key, numbers in shard_files(path).items():
        first, _ = ranges.get(key, (0, 0))
        found += [file for number, file in numbers.items() if number < first]
    return sorted(found)


def _remove_store(path: Path) -> None:
    """Delete a store's own files; a stranger's file in the folder stays."""
    (path / STORE_FILE).unlink(missing_ok=True)  # from here on it is no store
    for pattern in (*_OWN_FILES, "LOCK*"):
        for file in listed(path, pattern):
            file.unlink(missing_ok=True)
    for folder in (path / "datasets", path):
        with contextlib.suppress(OSError):  # something else is in it, or it was never there
            folder.rmdir()


# --------------------------------------------------------------------------------------------- merge


def merge_caches(
    cache_dir: Path,
    others: Sequence[Path],
    *,
    force: bool = False,
    command: str = "mirip-fast cache merge",
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Copy what other caches have and this one lacks. A merge that is broken off can be run again.

    The other caches may be a stranger's: shards are read as data, ledgers are parsed and written anew.

    Args:
        cache_dir: the cache that receives; made if there is none.
        others: cache folders, or single stores.
        force: join stores that do not agree on the images they share; the rows of ``cache_dir`` stay.
        command: what is running, for whoever finds the store locked.
        progress: called with the bytes copied, piece by piece.

    Returns:
        Of each store that was read ``source`` and ``target`` folder, ``series`` (name → rows added, images of
        both, of these those whose features have a cosine similarity below :data:`SAME`, and the smallest),
        ``corrupt`` rows, which were left out, ``datasets`` (sources of those that came along), ``twice`` (of
        these, sources that the store has another data set of) and ``problems`` (ledgers that cannot be read).

    Raises:
        StoreError: a cache is damaged, or does not agree with this one.
        StoreLockedError: a run writes to ``cache_dir``.
        DiskFullError: no room; what was copied stays.
    """
    sources = [  # all, before any is read
        path
        for other in others
        for path in ([other] if (other / STORE_FILE).exists() else store_folders(other))
    ]
    return [_merge_store(cache_dir, path, force, command, progress) for path in sources]


def _merge_store(
    cache_dir: Path, path: Path, force: bool, command: str, progress: Callable[[int], None]
) -> dict[str, Any]:
    source = FeatureStore.open(path, verify=True)
    folder = cache_dir / source.fingerprint_id
    if folder.resolve() == path.resolve():
        raise StoreError(f"{path} is the cache itself; name another one")
    corrupt = sum(bad for name in source.series() for _, _, bad in source.slots(name))
    target = FeatureStore.create(folder, source.fingerprint)
    _join_canaries(target, source, force=force)
    compared = {spec: _compare(target, source, spec) for spec in source.series().values()}
    for spec, (shared, differing, worst) in compared.items():
        if differing * 100 > shared and not force:  # one in a hundred may differ
            raise StoreError(
                f"{path} and {folder} do not agree: {differing} of the {shared} images "
                f"that both have in series {spec.name} have other features (cosine similarity down "
                f"to {worst:.4f}), as if another library or graphics card had computed them. "
                "Nothing was copied. Embed one of them anew, or add --force to join them nevertheless "
                f"(the rows of {folder} stay)."
            )
    with StoreWriter(target, command=command) as writer:
        todo = {}
        for name, spec in source.series().items():
            hashes = sorted(source.valid_hashes(name))
            todo[spec] = list(compress(hashes, writer.missing(name, hashes)))
        log.info(
            "%d rows (%s) to copy from %s to %s; %s are free",
            sum(map(len, todo.values())),
            format_bytes(sum(len(wanted) * spec.row_bytes for spec, wanted in todo.items())),
            *(path, folder, format_bytes(shutil.disk_usage(folder).free)),
        )
        series = {
            spec.name: (writer.copy(source, spec, todo[spec], progress), *compared[spec])
            for spec in todo
        }
    datasets, damaged = _datasets_of(path)
    problems = [str(error) for error in damaged]
    here = {str(dataset.source) for dataset in _datasets_of(folder)[0]}
    came, twice = [], []
    for dataset in datasets:
        try:
            _, new = copy_dataset(dataset, folder)
        except StoreError as error:
            problems.append(str(error))
            continue
        if new:
            came.append(str(dataset.source))
            twice += [str(dataset.source)] if str(dataset.source) in here else []
    return {
        "source": path,
        "target": folder,
        "series": series,
        "corrupt": corrupt,
        "datasets": came,
        "twice": twice,
        "problems": problems,
    }


def _compare(ours: FeatureStore, theirs: FeatureStore, spec: SeriesSpec) -> tuple[int, int, float]:
    """How many images both stores have in a series, how many of them differ, and the smallest cosine."""
    own = ours.series().get(spec.name, spec)
    if own != spec:
        raise StoreError(
            f"series {spec.name} has other rows in {theirs.path} ({spec.shape} {spec.dtype}) than in "
            f"{ours.path} ({own.shape} {own.dtype})"
        )
    shared = sorted(ours.valid_hashes(spec.name) & theirs.valid_hashes(spec.name))
    pairs = zip(
        ours.pieces(spec.name, ours.rows(spec.name, shared)),
        theirs.pieces(spec.name, theirs.rows(spec.name, shared)),
        strict=True,
    )
    alike = np.concatenate([np.empty(0), *(_cosines(a, b) for a, b in pairs)])
    differing = int(np.count_nonzero(~(alike >= SAME)))
    return len(shared), differing, float(min([1.0, *alike]))


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """[n] cosine similarity of the rows of two arrays [n, \\*shape]."""
    x, y = (array.reshape(len(array), -1).astype(np.float64) for array in (a, b))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    equal = (x == y).all(axis=1)
    return np.where(equal, 1.0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, np.inf))


def _join_canaries(target: FeatureStore, source: FeatureStore, *, force: bool) -> None:
    """Compare the features of the built-in test picture, which tell what computed each store."""
    try:
        ours, before = read_canary(target.path / CANARY_FILE, target.fingerprint_id)
        theirs, made_with = read_canary(source.path / CANARY_FILE, source.fingerprint_id)
    except StoreError as error:
        if force:
            return
        raise StoreError(
            f"{error} Nothing was copied: whether both caches were computed alike cannot be told. Add "
            "--force to join them nevertheless."
        ) from error
    if theirs and not ours and not target.series():
        write_canary(target.path / CANARY_FILE, target.fingerprint_id, theirs, made_with)
    worst = difference(ours, theirs)
    usual = TOLERANCE.get(str(target.fingerprint.get("precision")), min(TOLERANCE.values()))
    if worst > usual and not force:
        raise StoreError(
            f"{source.path} and {target.path} do not agree: their features of the built-in test picture "
            f"differ by {worst:.2%} (up to {usual:.1%} would be arithmetic). They were made with "
            f"{changes(before, made_with) or 'the same libraries'}. Nothing was copied. Embed one of them "
            "anew, or add --force to join them nevertheless."
        )


# -------------------------------------------------------------------------------------------- export


def check_export(file: Path, *, overwrite: bool | None = None) -> None:
    """See before hours of work that an export can be written there.

    Args:
        file: the file.
        overwrite: whether a file that is there is replaced; None: only an HDF5 file.

    Raises:
        StoreError: no folder for it, or something is there that is not to be replaced.
    """
    if file.is_dir():
        raise StoreError(f"{file} is a folder; name a file in it, such as {file / 'features.h5'}")
    if not file.parent.is_dir():
        raise StoreError(f"{file}: there is no folder {file.parent}")
    if (file.parent / STORE_FILE).exists():
        raise StoreError(f"{file} would lie among a store's shards; choose another folder")
    if file.exists() and overwrite is False:
        raise StoreError(f"{file} is there already; add --overwrite to replace it")
    if file.exists() and overwrite is None:
        start = b""
        with contextlib.suppress(ValueError), open_file(file) as stream:  # a pipe, a device
            start = stream.read(8)
        if start != b"\x89HDF\r\n\x1a\n":
            raise StoreError(f"{file} is there and no HDF5 file; choose another name")


def export_dataset(
    dataset: Dataset,
    file: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Write a data set's features to one plain HDF5 file; it appears whole or not at all.

    ``/features/cls`` and ``/features/patch`` are those of the base view; further views lie in
    ``/features/views/<view>/``. Line i of every dataset is the same image: ``/image_id``, ``/path``, and
    ``/tier`` where there are grades. Images that could not be embedded are left out. The file's attributes
    are ``fingerprint`` (JSON), ``fingerprint_id``, ``source`` and ``series``. Names are stored as UTF-8;
    bytes that are none (old file names) come back with ``surrogateescape``.

    Args:
        dataset: what to export.
        file: the file to write, on any disk.
        overwrite: replace a file that is there.
        progress: called with the bytes of features written and those to write.

    Returns:
        Name in the file → shape [images that have features, …] and number format.

    Raises:
        StoreError: the file is there, its folder is not, or an image's features are missing.
        DiskFullError: no room; says how much is needed. A file that was there stays.
    """
    check_export(file, overwrite=overwrite)
    store = FeatureStore.open(dataset.store_path)
    there, specs = dataset.embedded(), store.series()
    if not len(there):
        raise StoreError(f"{dataset.source}: no image has features; see {dataset.failures_csv}")
    hashes = there["sha256"].tolist()
    series = {}
    for view in dataset.views():
        folder = "" if view == dataset.views()[0] else f"views/{view.name}/"
        for kind in dataset.info["kinds"]:
            name = kind if kind == "cls" or layer_of(kind) else "patch"
            series[f"{folder}{name}"] = series_name(view, kind)
    wanted = {}
    for name, source in series.items():
        rows = store.rows(source, hashes)
        if source not in specs or (rows < 0).any():
            raise StoreError(
                f"{store.path}: {int((rows < 0).sum())} of {len(rows)} images have no row in series "
                f"{source} (there is: {', '.join(specs) or 'none'}); run `mirip-fast embed` on them first"
            )
        wanted[f"features/{name}"] = (specs[source], rows)
    total = len(there) * sum(spec.row_bytes for spec, _ in wanted.values())
    log.info(
        "%d images of %s: %s to write to %s; %s are free",
        len(there),
        dataset.source,
        format_bytes(total),
        file,
        format_bytes(shutil.disk_usage(file.parent).free),
    )
    written = 0

    def told(spec: SeriesSpec, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        nonlocal written
        for piece in store.pieces(spec.name, rows):
            yield piece
            written += piece.nbytes
            progress(written, total)

    columns = {
        "image_id": there["image_id"].tolist(),
        "path": there["file"].tolist(),
        "tier": there["tier"].astype(object).fillna("").tolist(),
    }
    if not any(columns["tier"]):
        del columns["tier"]
    texts = {
        name: [text.encode("utf-8", "surrogateescape") for text in values]
        for name, values in columns.items()
    }
    for text in (text for values in texts.values() for text in values if b"\0" in text):
        raise StoreError(f"{text!r} holds a zero byte, which texts in HDF5 cannot")
    write_export(
        file,
        {name: (spec, told(spec, rows)) for name, (spec, rows) in wanted.items()},
        texts,
        {
            "source": str(dataset.source),
            "series": json.dumps(series),
            "fingerprint": json.dumps(store.fingerprint, sort_keys=True),
            "fingerprint_id": store.fingerprint_id,
        },
    )
    return {f"/{n}": ((len(there), *spec.shape), spec.dtype) for n, (spec, _) in wanted.items()}
