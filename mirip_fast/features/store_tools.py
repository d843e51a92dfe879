"""Feature stores as a whole: exports for other programs, and joining stores made apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.shards import SeriesSpec, write_export
from mirip_fast.features.store import STORE_FILE, FeatureStore, differing_fields

#: Cosine similarity from which on two rows of one image count as the same: half precision and another
#: batch size stay far above, other weights or another preprocessing far below.
SAME = 0.999
_PIECE_BYTES = 16 << 20  # features in memory at once


def export(
    store: FeatureStore,
    file: Path,
    *,
    hashes: Sequence[bytes],
    image_ids: Sequence[str],
    paths: Sequence[str],
    series: Mapping[str, str],
    columns: Mapping[str, Sequence[str]] | None = None,
    attributes: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write features as one plain HDF5 file: ``/features/cls`` …, ``/image_id``, ``/path``.

    The file's attributes are ``fingerprint`` (JSON) and ``fingerprint_id``. Names are stored as UTF-8;
    bytes that are none (old file names) come back with ``surrogateescape``.

    Args:
        store: where the features are.
        file: the file to write; an older one is replaced.
        hashes: content hash of each of the n images.
        image_ids: n names.
        paths: n files.
        series: name below ``/features`` → series, for example ``{"cls": "cls.756"}``.
        columns: further texts, name → n of them, for example ``{"tier": [...]}``.
        attributes: further attributes of the file.
        progress: called with the bytes of features written, piece by piece.

    Raises:
        StoreError: an image has no row in a series, or ``file`` lies in a store.
        DiskFullError: no room.
    """
    if not len(hashes) == len(image_ids) == len(paths):
        raise ValueError(f"{len(hashes)} hashes, {len(image_ids)} ids, {len(paths)} paths")
    if (file.parent / STORE_FILE).exists():
        raise StoreError(f"{file} would lie among a store's shards; choose another folder")
    specs, features = store.series(), {}
    for name, source in series.items():
        rows = store.rows(source, hashes)
        if source not in specs or (rows < 0).any():
            there = ", ".join(specs) or "none"
            raise StoreError(
                f"{store.path}: {int((rows < 0).sum())} of {len(rows)} images have no row in series "
                f"{source} (there is: {there}); run `mirip-fast embed` on them first"
            )
        told = _telling(pieces(store, specs[source], rows), progress)
        features[f"features/{name}"] = (specs[source], told)
    texts = {
        name: [text.encode("utf-8", "surrogateescape") for text in values]
        for name, values in {"image_id": image_ids, "path": paths, **(columns or {})}.items()
    }
    for text in (text for values in texts.values() for text in values):
        if b"\0" in text:
            raise StoreError(f"{text!r} holds a zero byte, which texts in HDF5 can not")
    fingerprint = json.dumps(store.fingerprint, sort_keys=True)
    made_by = {"fingerprint": fingerprint, "fingerprint_id": store.fingerprint_id}
    write_export(file, features, texts, {**(attributes or {}), **made_by})


def _telling(
    parts: Iterator[NDArray[Any]], progress: Callable[[int], None]
) -> Iterator[NDArray[Any]]:
    for part in parts:
        yield part
        progress(part.nbytes)


def pieces(
    store: FeatureStore, spec: SeriesSpec, rows: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    """Features of the given rows, in order, a few MiB at a time: [m, \\*shape] each."""
    step = max(1, _PIECE_BYTES // spec.row_bytes)
    for start in range(0, len(rows), step):
        yield store.read(spec.name, rows[start : start + step], finite=False)


@dataclass(frozen=True)
class Overlap:
    """How far two stores agree on the images that a series of both has."""

    series: str
    shared: int
    differing: int  # images whose features have a cosine similarity below SAME
    worst: float  # the smallest cosine similarity

    @property
    def alike(self) -> bool:
        """Whether both were computed alike: at most one in a hundred images differs."""
        return self.differing * 100 <= self.shared


def compare(ours: FeatureStore, theirs: FeatureStore) -> list[Overlap]:
    """Compare the features of every image that both stores have, series by series."""
    result = []
    for name, spec in theirs.series().items():
        if ours.series().get(name, spec) != spec:
            raise StoreError(
                f"series {name} has other rows in {theirs.path} ({spec.shape} {spec.dtype}) than in "
                f"{ours.path} ({ours.series()[name].shape} {ours.series()[name].dtype})"
            )
        shared = sorted(ours.valid_hashes(name) & theirs.valid_hashes(name))
        pairs = zip(
            pieces(ours, spec, ours.rows(name, shared)),
            pieces(theirs, spec, theirs.rows(name, shared)),
            strict=True,
        )
        alike = np.concatenate([np.empty(0), *(_cosines(a, b) for a, b in pairs)])
        differing = int(np.count_nonzero(~(alike >= SAME)))
        result.append(Overlap(name, len(shared), differing, float(min([1.0, *alike]))))
    return result


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """[n] cosine similarity of the rows of two arrays [n, \\*shape]."""
    x, y = (array.reshape(len(array), -1).astype(np.float64) for array in (a, b))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    equal = (x == y).all(axis=1)
    return np.where(equal, 1.0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, np.inf))


def merge(
    target: FeatureStore,
    sources: Sequence[FeatureStore],
    *,
    command: str = "mirip-fast cache merge",
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, int]:
    """Copy into ``target`` every row of ``sources`` that it lacks.

    Only rows whose checksum matches are copied, and none that is not finite. A merge that is broken
    off can be run again.

    Returns:
        Series → rows added.

    Raises:
        StoreError: other features (names the differing fields), or a store given twice.
        StoreLockedError: a run writes to ``target``.
    """
    for source in sources:
        if source.path.resolve() == target.path.resolve():
            raise StoreError(f"{source.path} can not be merged into itself")
        if source.fingerprint_id != target.fingerprint_id:
            raise StoreError(
                f"{source.path} and {target.path} hold different features "
                f"({differing_fields(source.fingerprint, target.fingerprint)})"
            )
    added: dict[str, int] = {}
    with target.writer(command=command) as writer:
        for source in sources:
            checked = FeatureStore.open(source.path, verify=True)
            for name, spec in checked.series().items():
                hashes = sorted(checked.valid_hashes(name))
                lacking = np.flatnonzero(writer.missing(name, hashes)).tolist()
                wanted = [hashes[i] for i in lacking]
                rows = checked.rows(name, wanted)
                wanted = [wanted[i] for i in np.argsort(rows)]
                rows = np.sort(rows)
                done = 0
                for piece in pieces(checked, spec, rows):
                    names = wanted[done : done + len(piece)]
                    finite = np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
                    kept = [sha for sha, ok in zip(names, finite, strict=True) if ok]
                    writer.append(kept, {spec: piece[finite]})
                    added[name] = added.get(name, 0) + len(kept)
                    done += len(piece)
                    progress(piece.nbytes)
                added.setdefault(name, 0)
    target.refresh()
    return added
