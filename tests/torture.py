"""Kills, power losses, flipped bits, full disks and races against the feature store; counts what is lost.

``make torture`` (``python tests/torture.py``) runs everything and prints a line for each; the tests run a
little of it through the same functions, also with a safeguard of the store taken away, to show that losses
are found where there are some. Linux only: it forks, kills, and reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mirip_fast.errors import DiskFullError, StoreLockedError
from mirip_fast.features import shards
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter

SPECS = (SeriesSpec("cls.14", (24,), "float16"), SeriesSpec("grid2.14", (2, 3), "float32"))
FINGERPRINT = {"backbone": "torture"}
BATCH = 8


@cache
def sha(number: int) -> bytes:
    return hashlib.sha256(b"picture %d" % number).digest()


def rows_of(spec: SeriesSpec, numbers: Sequence[int]) -> np.ndarray:
    """What the rows of these pictures must be: a function of the number, the column and the series."""
    size = int(np.prod(spec.shape))
    n = np.asarray(numbers, np.int64)[:, None] * 7919 + np.arange(size) * 104729 + len(spec.name)
    return ((n % 65521) / 65521.0 - 0.5).astype(spec.dtype).reshape(-1, *spec.shape)


class Writer(Protocol):
    def missing(self, numbers: Sequence[int]) -> list[int]: ...

    def append(self, numbers: Sequence[int]) -> None: ...

    def close(self) -> None: ...


class Shards:
    """The feature store."""

    def __init__(self, shard_rows_limit: int = 64):
        self.limit = shard_rows_limit

    def writer(self, path: Path) -> Writer:
        shards._MAX_ROWS = self.limit
        writer = StoreWriter(FeatureStore.create(path, FINGERPRINT), command="torture")

        class Adapter:
            def missing(self, numbers: Sequence[int]) -> list[int]:
                lacking = np.zeros(len(numbers), bool)
                for spec in SPECS:
                    lacking |= writer.missing(spec.name, [sha(n) for n in numbers])
                return [n for n, lacks in zip(numbers, lacking, strict=True) if lacks]

            def append(self, numbers: Sequence[int]) -> None:
                writer.append([sha(n) for n in numbers], {s: rows_of(s, numbers) for s in SPECS})

            def close(self) -> None:
                writer.close()

        return Adapter()

    def served(self, path: Path) -> dict[str, dict[bytes, np.ndarray]]:
        if not (path / "store.json").exists():
            return {spec.name: {} for spec in SPECS}
        store = FeatureStore.open(path)
        result = {}
        for spec in SPECS:
            hashes = sorted(store.valid_hashes(spec.name))
            rows = store.rows(spec.name, hashes)
            features = store.read(spec.name, rows) if hashes else []
            result[spec.name] = dict(zip(hashes, features, strict=True))
        return result


def check(backend: Shards, path: Path, committed: Sequence[int], everything: int) -> None:
    """Every committed row is there, and every row that is served is right, to the last bit."""
    known = {sha(n): n for n in range(everything)}
    served = backend.served(path)
    for spec in SPECS:
        rows = served[spec.name]
        lost = [n for n in committed if sha(n) not in rows]
        assert not lost, f"{len(lost)} committed rows of {spec.name} are lost: {lost[:5]}"
        strange = [h.hex() for h in rows if h not in known]
        assert not strange, f"{len(strange)} rows of {spec.name} that nobody wrote: {strange[:2]}"
        if rows:
            found = np.stack(list(rows.values()))
            right = rows_of(spec, [known[h] for h in rows])
            wrong = (found.view(np.uint8) != right.view(np.uint8)).reshape(len(rows), -1).any(1)
            assert not wrong.any(), f"{wrong.sum()} of {len(rows)} rows of {spec.name} are wrong"


def memory_folder() -> str | None:
    """A folder in memory, where syncing takes no time; None where there is none (then a disk serves)."""
    folder = Path("/dev/shm")
    roomy = folder.is_dir() and shutil.disk_usage(folder).free > 1 << 30
    return str(folder) if roomy and os.access(folder, os.W_OK) else None


def in_child(work: Callable[[], None]) -> str | None:
    """Run ``work`` in a forked process; None where it went well, else why not (signals included)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            os.close(read)
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            if os.environ.get("TORTURE_TRACE"):
                text = traceback.format_exc()
            os.write(write, text[:4000].encode("utf-8", "replace"))
            status = 1
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        message = stream.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else message or f"died by signal {-code}"


def in_this_process(work: Callable[[], None]) -> str | None:
    """None where ``work`` went well, else why not."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@dataclass
class Count:
    """How many trials there were, and what went wrong in which."""

    trials: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str | None) -> bool:
        self.trials += 1
        if failure is not None:
            self.failures.append(failure)
        return failure is None


# ---------------------------------------------------------------------------------------------- kills


def kill_runs(backend: Shards, folder: Path, kills: int, seed: int = 0) -> Count:
    """Kill a writing process at random moments, look at every row, go on; again and again."""
    rng, count = random.Random(seed), Count()
    count.notes = {"committed rows": 0, "most rows saved untold": 0, "stores filled": 0}
    for store_number in itertools.count():
        path, total = folder / f"store{store_number}", 6000
        committed: set[int] = set()
        while len(committed) < total:
            if count.trials == kills:
                return count
            failure = _one_kill(backend, path, total, committed, rng, count.notes)
            if not count.add(failure):
                break  # this store is spoiled; a fresh one
        else:
            count.notes["stores filled"] += 1
    return count


def _one_kill(
    backend: Shards,
    path: Path,
    total: int,
    committed: set[int],
    rng: random.Random,
    notes: dict[str, int],
) -> str | None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _write_until_killed(backend, path, total, write)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        # Some while the store is being opened, the others within one of the first batches.
        batches = rng.randint(0, 12) if rng.random() < 0.8 else -1
        first = b"".join(stream.readline() for _ in range(1 + batches))
        time.sleep(rng.uniform(0, 0.02))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        lines = (first + stream.read()).split(b"\n")[:-1]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    errors = [line.decode() for line in lines if line.startswith(b"error")]
    if errors or code not in (0, -signal.SIGKILL):
        return errors[0] if errors else f"writer died by signal {-code}"
    before = len(committed)
    for line in lines:
        if line.startswith(b"todo"):
            todo = int(line.split()[1])
            again = todo - (total - before)
            if again > 0:
                return f"{again} committed rows were computed again"
            if again < 0:
                return f"{-again} rows are there now that were not there after the last kill"
        else:
            committed.update(map(int, line.split()[1:]))
    notes["committed rows"] += len(committed) - before
    return in_child(lambda: check(backend, path, sorted(committed), total)) or _catch_up(
        backend, path, total, committed, notes
    )


def _catch_up(
    backend: Shards, path: Path, total: int, committed: set[int], notes: dict[str, int]
) -> str | None:
    """What was saved in the last moment, but not told, counts as committed from here on."""
    read, write = os.pipe()

    def look() -> None:
        served = [set(rows) for rows in backend.served(path).values()]
        saved = [n for n in range(total) if all(sha(n) in hashes for hashes in served)]
        os.write(write, b" ".join(b"%d" % n for n in saved if n not in committed) + b"\n")

    failure = in_child(look)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        extra = set(map(int, stream.readline().split()))
    if failure is None and len(extra) > BATCH:
        failure = f"{len(extra)} rows were saved and not told, more than a batch"
    notes["most rows saved untold"] = max(notes["most rows saved untold"], len(extra))
    committed |= extra
    return failure


def _write_until_killed(backend: Shards, path: Path, total: int, pipe: int) -> None:
    status = 0
    try:
        writer = backend.writer(path)
        todo = writer.missing(range(total))
        os.write(pipe, b"todo %d\n" % len(todo))
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            writer.append(batch)
            os.write(pipe, b"committed " + b" ".join(b"%d" % n for n in batch) + b"\n")
        writer.close()
    except BaseException as error:
        os.write(pipe, f"error {type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        status = 1
    finally:
        os._exit(status)


# --------------------------------------------------------------------------------------------- replays


@dataclass
class Disk:
    """A disk as a power loss may leave it: what was synced is there, of the rest any part may be."""

    durable: dict[int, bytearray] = field(default_factory=dict)  # inode → bytes that were synced
    pending: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)  # as the folder was synced
    steps: list[tuple[str, str, int]] = field(default_factory=list)  # not synced: put/drop

    def apply(self, event: tuple[Any, ...]) -> None:
        kind, *rest = event
        if kind == "write":
            inode, offset, data = rest
            self.pending.setdefault(inode, []).append((offset, data))
        elif kind == "sync":
            for offset, data in self.pending.pop(rest[0], []):
                _put(self.durable.setdefault(rest[0], bytearray()), offset, data)
        elif kind == "content":  # written by Python's own streams and synced
            self.durable[rest[0]] = bytearray(rest[1])
            self.pending.pop(rest[0], None)
        elif kind in ("put", "drop"):
            self.steps.append((kind, rest[0], rest[1]))
        elif kind == "rename":
            self.steps += [("put", rest[1], rest[2]), ("drop", rest[0], 0)]
        elif kind == "sync folder":
            self.names = _step(self.names, self.steps)
            self.steps = []

    def after_kill(self, torn: tuple[int, int, bytes] | None = None) -> dict[str, bytes]:
        """The system lives: everything is there; of the write under way, the first bytes."""
        result = {}
        for name, inode in _step(self.names, self.steps).items():
            content = bytearray(self.durable.get(inode, b""))
            for offset, data in self.pending.get(inode, []):
                _put(content, offset, data)
            if torn is not None and torn[0] == inode:
                _put(content, torn[1], torn[2])
            result[name] = bytes(content)
        return result

    def after_power_loss(self, rng: random.Random) -> dict[str, bytes]:
        """Some of the folder's last changes, in order; of unsynced writes any sectors, in any order."""
        names = _step(self.names, self.steps[: rng.randint(0, len(self.steps))])
        share = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        result = {}
        for name, inode in names.items():
            content = bytearray(self.durable.get(inode, b""))
            for offset, data in self.pending.get(inode, []):
                sector = 512
                for start in range(0, len(data), sector):
                    if rng.random() < share:
                        _put(content, offset + start, data[start : start + sector])
            result[name] = bytes(content)
        return result


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _step(names: dict[str, int], steps: Sequence[tuple[str, str, int]]) -> dict[str, int]:
    names = dict(names)
    for kind, name, inode in steps:
        if kind == "put":
            names[name] = inode
        else:
            names.pop(name, None)
    return names


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[list[tuple[Any, ...]]]:
    """Every write, sync and change of a name below ``folder``, in order, while the block runs."""
    events: list[tuple[Any, ...]] = []
    calls = ("pwrite", "fdatasync", "fsync", "posix_fallocate", "rename", "replace", "unlink")
    real = {name: getattr(os, name) for name in calls}
    seen: set[str] = set()
    keep_open: list[int] = []  # so that no inode number is given to a second file

    def name_of(path: Any) -> str | None:
        """Name below the folder of a path or handle; locks are no part of the data."""
        full = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
        inside = full.is_relative_to(folder) and not full.name.startswith("LOCK")
        return str(full.relative_to(folder)) if inside else None

    def note(name: str, handle: int) -> int:
        inode: int = os.fstat(handle).st_ino
        if name not in seen:
            seen.add(name)
            keep_open.append(os.dup(handle))
            events.append(("put", name, inode))
        return inode

    def pwrite(handle: int, data: Any, offset: int) -> int:
        count: int = real["pwrite"](handle, data, offset)
        if name := name_of(handle):
            events.append(("write", note(name, handle), offset, bytes(data)[:count]))
        return count

    def fallocate(handle: int, offset: int, size: int) -> None:
        real["posix_fallocate"](handle, offset, size)
        if name := name_of(handle):  # HDF5 has written its bookkeeping before
            content = Path(f"/proc/self/fd/{handle}").read_bytes()
            events.append(("write", note(name, handle), offset, content[offset : offset + size]))

    def fdatasync(handle: int) -> None:
        real["fdatasync"](handle)
        if name := name_of(handle):
            events.append(("sync", note(name, handle)))

    def fsync(handle: int) -> None:
        real["fsync"](handle)
        if Path(f"/proc/self/fd/{handle}").is_dir():
            events.append(("sync folder",))
        elif name := name_of(handle):
            inode = note(name, handle)
            if any(e[0] == "write" and e[1] == inode for e in events):
                events.append(("sync", inode))
            else:
                events.append(("content", inode, Path(f"/proc/self/fd/{handle}").read_bytes()))

    def rename(source: Any, target: Any, **more: Any) -> None:
        inode = Path(source).stat().st_ino
        real["rename"](source, target, **more)
        if (old := name_of(source)) and (new := name_of(target)):
            seen.discard(old)
            seen.add(new)
            events.append(("rename", old, new, inode))

    def unlink(path: Any, **more: Any) -> None:
        real["unlink"](path, **more)
        if name := name_of(path):
            seen.discard(name)
            events.append(("drop", name, 0))

    hooks = {
        "pwrite": pwrite, "posix_fallocate": fallocate, "fdatasync": fdatasync, "fsync": fsync,
        "rename": rename, "replace": rename, "unlink": unlink,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(mock.patch.object(os, name, hook))
        try:
            yield events
        finally:
            for handle in keep_open:
                os.close(handle)


def replays(
    backend: Shards,
    folder: Path,
    *,
    batches: int = 8,
    every: int = 1,
    losses: int = 3,
    enough: int | None = None,
    seed: int = 0,
) -> tuple[Count, Count]:
    """Write a few batches (with a close and a resume between), then live every moment again.

    At each event: a kill right there (and within the write), and power losses with random parts of
    what was not synced. Each state must open, serve every committed row and no wrong one, and resume.

    Stops after ``enough`` failures.

    Returns:
        Kills and power losses.
    """
    path = folder / "recorded"
    path.mkdir()
    total = batches * BATCH
    with recorded(path) as events:
        for part in (range(total // 2), range(total // 2, total)):
            writer = backend.writer(path)
            todo = [n for n in part if n in set(writer.missing(part))]
            for start in range(0, len(todo), BATCH):
                writer.append(todo[start : start + BATCH])
                events.append(("committed", todo[start : start + BATCH]))
            writer.close()
    rng, disk, committed = random.Random(seed), Disk(), []
    kills, power = Count(notes={"events": len(events)}), Count()

    def judge(count: Count, files: dict[str, bytes], where: str) -> None:
        state = folder / "state"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        for name, content in files.items():
            (state / name).write_bytes(content)
        numbers = list(committed)
        failure = in_this_process(lambda: _check_and_resume(backend, state, numbers, total))
        count.add(failure and f"{where}: {failure}")

    for i, event in enumerate(events):
        if event[0] == "committed":
            committed.extend(event[1])
            continue
        if enough is not None and len(kills.failures) + len(power.failures) >= enough:
            return kills, power
        if i % every == 0:
            judge(kills, disk.after_kill(), f"kill before event {i} {event[:2]}")
            if event[0] == "write" and len(event[3]) > 1:
                part = event[3][: rng.randrange(1, len(event[3]))]
                torn = (event[1], event[2], part)
                judge(kills, disk.after_kill(torn), f"kill within event {i} {event[:2]}")
            for _ in range(losses):
                judge(power, disk.after_power_loss(rng), f"power loss before event {i}")
        disk.apply(event)
    judge(kills, disk.after_kill(), "at the end")
    return kills, power


def _check_and_resume(backend: Shards, path: Path, committed: Sequence[int], total: int) -> None:
    check(backend, path, committed, total)
    with contextlib.closing(backend.writer(path)) as writer:
        todo = writer.missing(range(total))
        again = set(todo) & set(committed)
        assert not again, f"{len(again)} committed rows are computed again"
        for start in range(0, len(todo), BATCH):
            writer.append(todo[start : start + BATCH])
        check(backend, path, range(total), total)  # readers are not blocked by a writer
    check(backend, path, range(total), total)


# -------------------------------------------------------------------------------------- flips and disks


def every_bit(folder: Path) -> Count:
    """Flip every single bit of one row of each series: found, and only that row."""
    writer, count = Shards().writer(folder / "bits"), Count()
    writer.append(range(BATCH))
    writer.close()
    store = FeatureStore.open(folder / "bits")
    for spec in SPECS:
        (shard,), slot = store.shards(spec.name), BATCH // 2
        for at, size in (
            (shard.features_at, spec.row_bytes),
            (shard.sha256_at, 32),
            (shard.checksum_at, 8),
        ):
            for position in range(at + slot * size, at + (slot + 1) * size):
                for bit in (1 << b for b in range(8)):
                    _flip(shard.path, position, bit)
                    valid = shard.valid()
                    found = not valid[slot] and int(valid.sum()) == BATCH - 1
                    count.add(None if found else f"{spec.name} byte {position} bit {bit}")
                    _flip(shard.path, position, bit)
    return count


def flips(folder: Path, trials: int, seed: int = 0) -> tuple[Count, Count]:
    """Flip one bit: of a stored row (found, and only that row), of an empty slot (no row appears)."""
    rng = random.Random(seed)
    backend = Shards()
    writer = backend.writer(folder / "flips")
    numbers = list(range(40))
    for start in range(0, len(numbers), BATCH):
        writer.append(numbers[start : start + BATCH])
    writer.close()
    store = FeatureStore.open(folder / "flips")
    stored, empty = Count(), Count()
    for trial in range(trials):
        shard = store.shards(rng.choice(SPECS).name)[0]
        sizes = (shard.spec.row_bytes, 32, 8)
        starts = (shard.features_at, shard.sha256_at, shard.checksum_at)
        which, used = trial % 3, trial % 5 != 0
        slot = rng.randrange(len(numbers)) if used else rng.randrange(len(numbers), shard.rows)
        position = starts[which] + slot * sizes[which] + rng.randrange(sizes[which])
        bit = 1 << rng.randrange(8)
        _flip(shard.path, position, bit)
        valid = shard.valid()
        where = f"{shard.path.name} slot {slot} {('features', 'sha256', 'checksum')[which]}"
        if used:
            found = not valid[slot] and int(valid.sum()) == len(numbers) - 1
            stored.add(None if found else f"{where}: not found")
        else:
            served = len(FeatureStore.open(store.path).valid_hashes(shard.spec.name))
            fine = served == len(numbers) == int(valid.sum())
            empty.add(None if fine else f"{where}: a row appeared")
        _flip(shard.path, position, bit)
    return stored, empty


def _flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([value ^ bit]))


def header_flips(folder: Path, step: int = 1) -> Count:
    """Flip each bit of the HDF5 bookkeeping: refused by a StoreError, or no wrong row is served.

    In processes of their own: HDF5 itself must not crash on it either.
    """
    from mirip_fast.errors import StoreError

    backend, count = Shards(limit_of_headers), Count(notes={"refused": 0, "harmless": 0})
    path = folder / "headers"
    writer = backend.writer(path)
    writer.append(range(BATCH))
    writer.close()
    shard = FeatureStore.open(path).shards(SPECS[0].name)[0]
    end = min(shard.features_at, shard.sha256_at, shard.checksum_at)

    def one(position: int, bit: int) -> bytes:
        _flip(shard.path, position, bit)
        try:
            served = FeatureStore.open(path, verify=True)
            hashes = sorted(served.valid_hashes(SPECS[0].name))
            rows = served.read(SPECS[0].name, served.rows(SPECS[0].name, hashes)) if hashes else []
            right = {sha(n): rows_of(SPECS[0], [n])[0] for n in range(BATCH)}
            for h, row in zip(hashes, rows, strict=True):
                np.testing.assert_array_equal(row, right[h])
            return b"h"
        except StoreError:
            return b"r"
        except Exception:
            return b"x"
        finally:
            _flip(shard.path, position, bit)

    todo = [(position, 1 << b) for position in range(0, end, step) for b in range(8)]
    whole = shard.path.read_bytes()
    while todo:  # one child does many, until one kills it
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            for position, bit in todo:
                os.write(write, one(position, bit))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            results = stream.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for (position, bit), result in zip(todo, results, strict=False):
            count.notes["refused"] += result == ord("r")
            count.notes["harmless"] += result == ord("h")
            wrong = f"byte {position} bit {bit}: a wrong row, or another error"
            count.add(wrong if result == ord("x") else None)
        todo = todo[len(results) :]
        if todo:
            count.add(f"byte {todo[0][0]} bit {todo[0][1]}: the process died with {code}")
            todo = todo[1:]
            shard.path.write_bytes(whole)
    return count


limit_of_headers = 16


def spoilt_runs(folder: Path, flips: int, seed: int = 0) -> Count:
    """Damage every file of three runs: an error that names it, or the same scores, tiers and figures."""
    from made_run import make_runs, spoil

    count, here = Count(), Path.cwd()
    os.chdir(folder)
    try:
        for run in make_runs(folder):
            spoil(run.relative_to(folder), flips, seed, count.add)
    finally:
        os.chdir(here)
    return count


def full_disks(folder: Path, sizes: Sequence[int], seed: int = 0) -> Count:
    """Let files grow only so far: a clear error, never a signal; later the run goes on."""
    count = Count()
    for size in sizes:
        path = folder / f"limit{size}"
        committed: list[int] = []

        def fill(path: Path = path, size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            _fill_until_full(path)

        failure = in_child(fill)
        with contextlib.suppress(FileNotFoundError):
            committed = json.loads((path.parent / f"{path.name}.told").read_text())
        count.add(failure or in_child(lambda p=path, c=committed: _go_on(p, c)))  # type: ignore[misc]
        shutil.rmtree(path, ignore_errors=True)
    return count


def limits(count: int) -> list[int]:
    """File sizes below that of a shard of the first series, beginning with almost nothing."""
    with tempfile.TemporaryDirectory() as name:
        writer = Shards().writer(Path(name))
        writer.append(range(BATCH))
        writer.close()
        size = max(file.stat().st_size for file in Path(name).glob("*.h5"))
    return [10 + (size - 11) * i // max(1, count - 1) for i in range(count)]


def full_tmpfs(folder: Path, sizes: Sequence[int]) -> Count | None:
    """The same on a small file system of its own; None where mounting is not possible."""
    count = Count()
    mount = folder / "mount"
    mount.mkdir()
    for size in sizes:
        options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(mount)]
        if os.geteuid() or subprocess.run(options, check=False, capture_output=True).returncode:
            return None
        try:
            path = mount / "store"
            told = mount.parent / "store.told"
            told.unlink(missing_ok=True)
            failure = in_child(lambda p=path, t=told: _fill_until_full(p, t))  # type: ignore[misc]
            committed = json.loads(told.read_text()) if told.exists() else []
            subprocess.run(
                ["mount", "-o", "remount,size=64m", str(mount)], check=True, capture_output=True
            )
            count.add(failure or in_child(lambda p=path, c=committed: _go_on(p, c)))  # type: ignore[misc]
        finally:
            subprocess.run(["umount", str(mount)], check=True, capture_output=True)
    return count


def _fill_until_full(path: Path, told: Path | None = None) -> None:
    told = told or path.parent / f"{path.name}.told"
    committed: list[int] = []
    try:
        writer = Shards().writer(path)
        try:
            for start in range(0, 4000, BATCH):
                writer.append(range(start, start + BATCH))
                committed += range(start, start + BATCH)
        finally:
            writer.close()
    except DiskFullError as error:
        assert "No room" in str(error) and "lost" in str(error), error
        check(Shards(), path, committed, 4000)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
        told.write_text(json.dumps(committed))
        return
    raise AssertionError("the disk was never full")


def _go_on(path: Path, committed: Sequence[int]) -> None:
    if path.exists():
        check(Shards(), path, committed, 4000)
    writer = Shards().writer(path)
    left = [str(p) for p in path.iterdir() if p.name.endswith(".partial")]
    assert not left, left
    todo = writer.missing(range(4000))
    assert not set(todo) & set(committed), "committed rows are computed again"
    writer.append(todo[:200])
    writer.close()
    check(Shards(), path, [*committed, *todo[:200]], 4000)


def lock_races(folder: Path, rounds: int, processes: int = 6) -> Count:
    """Many open one store for writing at once: one gets it, the others name it; a killed one frees it."""
    count = Count()
    FeatureStore.create(folder / "race", FINGERPRINT)
    for _ in range(rounds):
        go_read, go_write = os.pipe()
        out_read, out_write = os.pipe()
        children = []
        for _ in range(processes):
            pid = os.fork()
            if pid == 0:
                os.close(go_write)
                os.read(go_read, 1)
                try:
                    StoreWriter(FeatureStore.open(folder / "race"), command="race")
                    os.write(out_write, b"got %d\n" % os.getpid())
                    time.sleep(60)
                except StoreLockedError as error:
                    text = str(error).split(" on ")[0].split()[-1]
                    os.write(out_write, f"told {text}\n".encode())
                except BaseException as error:
                    os.write(out_write, f"error {error!r}\n".encode())
                os._exit(0)
            children.append(pid)
        os.close(go_read)
        os.close(out_write)
        os.close(go_write)  # off they go
        lines = []
        with os.fdopen(out_read, "rb") as stream:
            while len(lines) < processes and (line := stream.readline()):
                lines.append(line.split())
        holders = [int(words[1]) for words in lines if words[0] == b"got"]
        named = [words for words in lines if words[0] == b"told" and int(words[1]) in holders]
        fine = len(holders) == 1 and len(named) == processes - 1
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        StoreWriter(FeatureStore.open(folder / "race")).close()  # free at once
        count.add(None if fine else f"{lines}")
    return count


# ------------------------------------------------------------------------------------------------ main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=3000)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where to work (default: in memory, where syncing is quick)")
    parser.add_argument("--quick", action="store_true", help="fewer replays")
    options = parser.parse_args()
    every, seed = 5 if options.quick else 1, options.seed
    bad = []

    def tell(what: str, count: Count | None) -> None:
        notes = "skipped: not possible here" if count is None else count.notes or ""
        count = count or Count()
        print(
            f"{what:46} {count.trials:7} trials {len(count.failures):5} failures  {notes}",
            flush=True,
        )
        print(
            *(f"    {failure[:300]}" for failure in count.failures[:5]),
            sep="\n",
            end="",
            flush=True,
        )
        bad.extend([what] if count.failures else [])

    place = options.dir or memory_folder()
    with tempfile.TemporaryDirectory(dir=place) as name:
        root = Path(name)

        def room(title: str) -> Path:
            folder = root / title
            folder.mkdir()
            return folder

        tell("kill -9, resumed", kill_runs(Shards(), room("k"), options.kills, seed))
        kills, power = replays(Shards(16), room("r"), every=every, losses=4, seed=seed)
        tell("kill at every system call, replayed", kills)
        tell("power losses, modelled", power)
        tell("every bit of a row flipped", every_bit(room("b")))
        stored, empty = flips(room("f"), options.flips, seed)
        tell("bits of rows flipped", stored)
        tell("bits of empty slots flipped", empty)
        tell("bits of HDF5 bookkeeping flipped", header_flips(room("h"), 7 if options.quick else 1))
        sizes = limits(24 if options.quick else 100)
        tell("disk full (file size limits)", full_disks(room("d"), sizes))
        sizes = [2**n for n in range(16, 20)] + [3 * 2**n for n in range(15, 18)]
        tell("disk full (small file systems)", full_tmpfs(room("t"), sizes))
        tell("lock races of 6 processes", lock_races(room("l"), options.races))
        flips_of_runs = spoilt_runs(room("s"), options.flips // 100, seed)
        tell("runs: every file flipped, cut, emptied, lost", flips_of_runs)
    print("NOT AS IT MUST BE: " + "; ".join(bad) if bad else "All as it must be.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
