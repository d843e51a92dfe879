"""Joining caches that were made apart: rows of the same fingerprint are united, data sets come along.

The other cache may be a stranger's. Nothing in it is trusted: shards are read as data, ledgers are parsed
and written anew.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.cache_info import datasets_of, store_folders
from mirip_fast.features.canary import CANARY_FILE, TOLERANCE, read_canary, write_canary
from mirip_fast.features.datasets import copy_dataset
from mirip_fast.features.store import STORE_FILE, FeatureStore
from mirip_fast.features.store_tools import Overlap, compare, merge
from mirip_fast.files import format_bytes

log = logging.getLogger(__name__)

#: Features by series, and what made them.
_Canary = tuple[dict[str, NDArray[np.float32]], dict[str, str]]


@dataclass(frozen=True)
class MergedStore:
    """What became of one store of another cache."""

    source: Path
    target: Path
    added: dict[str, int]  # series → rows copied
    overlaps: list[Overlap]
    spoiled: int  # damaged rows, which were left out
    datasets: list[str]  # sources of the data sets that came along
    twice: list[str]  # of these, sources that the store has another data set of
    problems: list[str]  # ledgers that could not be read


def other_stores(other: Path) -> list[Path]:
    """The stores of a cache folder, or the one store that the folder is.

    Raises:
        RunNotFoundError: there is none.
    """
    return [other] if (other / STORE_FILE).exists() else store_folders(other)


def merge_caches(
    cache_dir: Path,
    others: Sequence[Path],
    *,
    force: bool = False,
    command: str = "mirip-fast cache merge",
    progress: Callable[[int], None] = lambda _: None,
) -> list[MergedStore]:
    """Copy what other caches have and this one lacks. A merge that is broken off can be run again.

    Args:
        cache_dir: the cache that receives; made if there is none.
        others: cache folders, or single stores.
        force: join stores that do not agree on the images they share; the rows of ``cache_dir`` stay.
        command: what is running, for whoever finds the store locked.
        progress: called with the bytes copied, piece by piece.

    Raises:
        StoreError: a cache is damaged, or does not agree with this one.
        StoreLockedError: a run writes to ``cache_dir``.
        DiskFullError: no room; what was copied stays.
    """
    sources = [path for other in others for path in other_stores(other)]  # all, before any is read
    return [_merge_store(cache_dir, path, force, command, progress) for path in sources]


def _merge_store(
    cache_dir: Path, path: Path, force: bool, command: str, progress: Callable[[int], None]
) -> MergedStore:
    source = FeatureStore.open(path, verify=True)
    folder = cache_dir / source.fingerprint_id
    if folder.resolve() == path.resolve():
        raise StoreError(f"{path} is the cache itself; name another one")
    spoiled = sum(source.spoiled(name) for name in source.series())
    target = FeatureStore.create(folder, source.fingerprint)
    _join_canaries(target, source, force=force)
    overlaps = compare(target, source)
    apart = [o for o in overlaps if not o.alike]
    if apart and not force:
        raise StoreError(
            f"{path} and {folder} do not agree: {apart[0].differing} of the {apart[0].shared} images "
            f"that both have in series {apart[0].series} have other features (cosine similarity down "
            f"to {apart[0].worst:.4f}), as if another library or graphics card had computed them. "
            "Nothing was copied. Embed one of them anew, or add --force to join them nevertheless "
            f"(the rows of {folder} stay)."
        )
    _say_size(target, source)
    added = merge(target, [source], command=command, progress=progress)
    datasets, damaged = datasets_of(path)
    problems = [str(error) for error in damaged]
    here = {str(dataset.source) for dataset in datasets_of(folder)[0]}
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
    return MergedStore(path, folder, added, overlaps, spoiled, came, twice, problems)


def _join_canaries(target: FeatureStore, source: FeatureStore, *, force: bool) -> None:
    """Compare the features of the built-in test picture, which tell what computed each store."""
    ours, theirs = _canary(target, force=force), _canary(source, force=force)
    if theirs is None:
        return
    features, made_with = theirs
    if ours is None:
        if not target.series():
            kept = {name: [float(f"{x:.7g}") for x in row] for name, row in features.items()}
            write_canary(target.path / CANARY_FILE, target.fingerprint_id, kept, made_with)
        return
    worst = 0.0
    for name in ours[0].keys() & features.keys():
        a, b = ours[0][name].astype(np.float64), features[name].astype(np.float64)
        apart = float(np.linalg.norm(a - b) / np.linalg.norm(a)) if a.shape == b.shape else np.inf
        worst = max(worst, apart)
    usual = TOLERANCE.get(str(target.fingerprint.get("precision")), min(TOLERANCE.values()))
    if worst > usual and not force:
        changed = [
            f"{name} {ours[1].get(name, 'none')} and {made_with.get(name, 'none')}"
            for name in dict.fromkeys([*ours[1], *made_with])
            if ours[1].get(name) != made_with.get(name)
        ]
        raise StoreError(
            f"{source.path} and {target.path} do not agree: their features of the built-in test picture "
            f"differ by {worst:.2%} (up to {usual:.1%} would be arithmetic). They were made with "
            f"{'; '.join(changed) or 'the same libraries'}. Nothing was copied. Embed one of them anew, or "
            "add --force to join them nevertheless."
        )


def _canary(store: FeatureStore, *, force: bool) -> _Canary | None:
    """What a store keeps of its test picture; None where it has nothing, or nothing to go by with force."""
    file = store.path / CANARY_FILE
    try:
        return read_canary(file, store.fingerprint_id)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if force:
            return None
        raise StoreError(
            f"{file} can not be read ({error}): whether both caches were computed alike can not be told. "
            "Nothing was copied. Put it back, or add --force to join them nevertheless."
        ) from error


def _say_size(target: FeatureStore, source: FeatureStore) -> None:
    rows = size = 0
    for name, spec in source.series().items():
        lacking = len(source.valid_hashes(name) - target.valid_hashes(name))
        rows, size = rows + lacking, size + lacking * spec.row_bytes
    log.info(
        "%d rows (%s) to copy from %s to %s; %s are free",
        rows,
        format_bytes(size),
        source.path,
        target.path,
        format_bytes(shutil.disk_usage(target.path).free),
    )
