"""Which parts of a cache nobody needs any more, and giving their disk space back.

What a data set's ledger names is never touched. Rows that no ledger names may belong to a run that was
interrupted before it wrote its ledger, so those written lately stay.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from mirip_fast.errors import StoreError
from mirip_fast.features.cache_info import datasets_of, folder_bytes, store_folders, used_hashes
from mirip_fast.features.canary import CANARY_FILE
from mirip_fast.features.datasets import Dataset, remove_dataset, unfinished_datasets
from mirip_fast.features.store import STORE_FILE, FeatureStore
from mirip_fast.features.store_files import listed, read_ranges, shard_files
from mirip_fast.features.store_prune import prune_locked

#: Rows that no data set names stay this long: the interrupted run that made them may yet go on.
KEPT_DAYS = 14.0
_DAY = 86_400.0


@dataclass(frozen=True)
class Wanted:
    """What to give up, beside rows that no data set names."""

    older_than: float = KEPT_DAYS  # days since a shard was written to; younger ones keep their rows
    trials: bool = False  # forget data sets that were embedded with --limit
    series: bool = False  # drop views and token kinds that no data set lists


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
    wanted: Wanted = field(repr=False)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.whole or self.trials or self.dropped or self.leftovers or self.frees > 0)


def plan_prune(cache_dir: Path, wanted: Wanted) -> list[StorePlan]:
    """What pruning would do in every store of a cache; changes nothing.

    Raises:
        RunNotFoundError: there is no store.
        StoreError: a store or a ledger is damaged: what it needs can not be told, so nothing is pruned.
    """
    return [plan_store(path, wanted) for path in store_folders(cache_dir)]


def plan_store(path: Path, wanted: Wanted) -> StorePlan:
    """What pruning would do in one store."""
    store = FeatureStore.open(path)
    trials, kept = _divided(path, wanted)
    used = used_hashes(kept)
    young = _young_hashes(store, wanted)
    listed = {name for dataset in kept for name in dataset.series()}
    unused = [n for n in store.series() if wanted.series and kept and n not in listed]
    keep = used | young
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
    frees += sum(folder_bytes(dataset.folder) for dataset in trials)
    return StorePlan(
        path=path,
        whole=whole,
        trials=tuple(trials),
        kept_trials=sum(dataset.info["limit"] is not None for dataset in kept),
        young=too_young,
        kept=kept_rows,
        dropped=dropped,
        series=tuple(unused),
        leftovers=leftovers,
        frees=folder_bytes(path) if whole else frees,
        needs=needs,
        wanted=wanted,
    )


def carry_out(plan: StorePlan, *, command: str = "mirip-fast cache prune") -> int:
    """Do what a plan says. What came to be used since the plan was made stays.

    A crash at any point loses no row that a data set uses.

    Returns:
        The bytes that were given back.

    Raises:
        DiskFullError: no room for the rows that stay; nothing was changed in that store.
        StoreLockedError: a run writes to the store; nothing was changed.
    """
    path = plan.path
    before = folder_bytes(path)
    store = FeatureStore.open(path)
    with store.writer(command=command):
        now = plan_store(path, plan.wanted)  # under the lock nobody adds rows
        for dataset in now.trials:  # before its rows: a ledger must not name rows that are gone
            remove_dataset(dataset)
        if now.whole:
            _remove_store(path)
            return before - (folder_bytes(path) if path.exists() else 0)
        for file in now.leftovers:
            file.unlink(missing_ok=True)
        for folder in unfinished_datasets(path):
            shutil.rmtree(folder, ignore_errors=True)
        _, kept = _divided(path, plan.wanted)
        keep = used_hashes(kept) | _young_hashes(store, plan.wanted)
        prune_locked(store, keep, now.series)
    return before - folder_bytes(path)


def _divided(path: Path, wanted: Wanted) -> tuple[list[Dataset], list[Dataset]]:
    """The data sets to forget, and those to keep."""
    datasets, damaged = datasets_of(path)
    if damaged:
        raise StoreError(f"{damaged[0]} Until then nothing in {path} is pruned.")
    trials = [d for d in datasets if wanted.trials and d.info["limit"] is not None]
    return trials, [dataset for dataset in datasets if dataset not in trials]


def _young_hashes(store: FeatureStore, wanted: Wanted) -> set[bytes]:
    """The content hashes of every row in a shard that was written to lately."""
    oldest = time.time() - wanted.older_than * _DAY
    young: set[bytes] = set()
    for name in store.series():
        for shard in store.shards(name):
            if wanted.older_than > 0 and shard.path.stat().st_mtime > oldest:
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


#: The files of a store besides store.json and its locks.
_OWN_FILES = (
    "*.h5", "shards-r*.json", "DIRTY*", ".*.partial", "*.damaged", CANARY_FILE, "neighbours-*.faiss",
)  # fmt: skip


def _remove_store(path: Path) -> None:
    """Delete a store's own files; a stranger's file in the folder stays."""
    (path / STORE_FILE).unlink(missing_ok=True)  # from here on it is no store
    for pattern in _OWN_FILES:
        for file in listed(path, pattern):
            file.unlink(missing_ok=True)
    for file in listed(path, "LOCK*"):
        file.unlink(missing_ok=True)
    for folder in (path / "datasets", path):
        with contextlib.suppress(OSError):  # something else is in it, or it was never there
            folder.rmdir()
