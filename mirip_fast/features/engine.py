"""The stages behind decoding: threads that run the backbone, one that writes, and how long they took."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoppedError
from mirip_fast.features.canary import Canary
from mirip_fast.features.forward import Batch, Computed, Forward
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.threads import WorkThread

if TYPE_CHECKING:
    from mirip_fast.features.backbone import Backbone

T = TypeVar("T")

_COMMITTED_AT_ONCE = 8  # batches that one sync may cover
_STOP_SECONDS = 4.0  # for each stage to finish what it is doing when the run is stopped
#: The stages, in the order of an image's way through them.
STAGES = ("read + decode", "copy", "backbone", "copy back", "write")
_BUSY = 0.7  # from this share of its time on, something is the limit
_WAITING = 0.15


class Engine:
    """The stages behind decoding: the backbone, and writing what it gives.

    Args:
        backbone: loaded.
        recipe: what to compute.
        writer: where the rows go.
        cores: processor cores to use.
        batch_size: images per pass; None: by the device and the number of tokens.
        complete: told which contents have their rows by now, or why not; called from a thread.
        speed: told how long everything took.
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        writer: StoreWriter,
        cores: int,
        batch_size: int | None,
        complete: Callable[[Sequence[bytes], Mapping[bytes, str]], None],
        speed: Speed,
    ):
        self.speed = speed
        self.done = 0  # images committed, or failed in the backbone
        self._cores, self._recipe, self._writer, self._complete = cores, recipe, writer, complete
        self._forward = Forward(backbone, recipe, cores, batch_size, self.speed)
        self._canary = Canary(writer.store.path, recipe)
        self._stop = threading.Event()
        self._release = self._forward.prepare(self._stop)
        self.workers = self._forward.workers
        self._write = Stage(
            "mirip-write", self._commit, room=2 * self.workers, at_once=_COMMITTED_AT_ONCE
        )
        self._compute: Stage[Batch | None] = Stage(
            "mirip-compute",
            self._run,
            threads=self.workers,
            room=self.workers + 1,
            idle=self.speed.wait,
        )
        self.put(None)  # the canary

    @property
    def batch_size(self) -> int:
        """Images per pass, as memory allows."""
        return self._forward.batch_size

    def put(self, batch: Batch | None) -> None:
        """Hand over a batch; waits for room. Raises what went wrong in any stage."""
        self._compute.put(batch)

    def finish(self, tick: Callable[[], None]) -> None:
        """Wait until everything is committed. Raises what went wrong in any stage."""
        self._compute.finish(tick)
        self._write.finish(tick)
        self._release()

    def stop(self) -> None:
        """End soon: what is computed is still committed, the rest is dropped."""
        self._stop.set()
        self._canary.give_up(StoppedError())
        self._compute.stop(drop=True, timeout_s=_STOP_SECONDS)
        self._write.stop(drop=False, timeout_s=_STOP_SECONDS)
        self._release()

    def speed_report(self, workers: int, images: int) -> SpeedReport:
        """Where the time went until now, in which so many images were computed."""
        return self.speed.report(
            workers=workers,
            threads=self.workers,
            cores=self._cores,
            device=self._forward.backbone.device.type,
            images=images,
        )

    def _run(self, batches: list[Batch | None]) -> None:
        for batch in batches:
            if batch is None:
                started, cpu = time.perf_counter(), time.thread_time()
                self._canary.check(self._forward.backbone, self._forward.shape_of_one)
                self.speed.add("backbone", time.perf_counter() - started, time.thread_time() - cpu)
            else:
                for computed in self._forward.run(batch):
                    self._write.put(computed)

    def _commit(self, batches: list[Computed]) -> None:
        self._canary.wait()
        alike: dict[tuple[SeriesSpec, ...], tuple[list[bytes], list[dict[SeriesSpec, Any]]]] = {}
        for batch in batches:
            rows = batch.rows()
            hashes, parts = alike.setdefault(tuple(rows), ([], []))
            hashes.extend(batch.hashes)
            parts.append(rows)
        started, cpu = time.perf_counter(), time.thread_time()
        for specs, (hashes, parts) in alike.items():
            self._append(hashes, {s: np.concatenate([part[s] for part in parts]) for s in specs})
        self.speed.add("write", time.perf_counter() - started, time.thread_time() - cpu)

    def _append(self, hashes: list[bytes], rows: dict[SeriesSpec, NDArray[Any]]) -> None:
        finite = np.ones(len(hashes), dtype=bool)
        for values in rows.values():
            finite &= np.isfinite(values.reshape(len(hashes), -1)).all(axis=1)
        reason = f"a feature does not fit {self._recipe.store_dtype} (not finite)"
        if self._recipe.store_dtype == "float16":
            reason += "; try --store-dtype float32"
        failures = {h: reason for h, fits in zip(hashes, finite, strict=True) if not fits}
        if finite.all():
            self._writer.append(hashes, rows)
        elif finite.any():
            kept = [sha for sha, fits in zip(hashes, finite, strict=True) if fits]
            self._writer.append(kept, {spec: values[finite] for spec, values in rows.items()})
        self._complete(hashes, failures)
        self.done += len(hashes)


class Stage(Generic[T]):
    """Does ``work`` on what is put in, in threads of its own.

    The queue is short, so that a stage that is quicker than the next one waits for it instead of piling up
    its results. What ``work`` raises ends the stage, and is raised again to whoever puts in more or finishes
    it: an error travels up the pipeline to the thread that the user sees.

    Args:
        name: of the threads.
        work: called with a list of 1 to ``at_once`` items, in order, from ``threads`` threads.
        threads: how many.
        room: how many items may wait.
        at_once: how many waiting items one call may take.
        idle: told the seconds that a thread waited for an item.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[T]], None],
        *,
        threads: int = 1,
        room: int = 2,
        at_once: int = 1,
        idle: Callable[[float], None] = lambda _: None,
    ):
        self._work, self._room, self._at_once, self._idle = work, room, at_once, idle
        self._items: deque[T] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._threads = [WorkThread(name, self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, item: T) -> None:
        """Hand over one item; waits for room.

        Raises:
            Exception: whatever ended the stage.
        """
        with self._change:
            while len(self._items) >= self._room and not self._over():
                self._change.wait()
            self._raise()
            if self._closing:
                raise StoppedError
            self._items.append(item)
            self._change.notify_all()

    def finish(self, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until all that was put in is done.

        Args:
            tick: called a few times per second meanwhile.

        Raises:
            Exception: whatever ended the stage.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            while not thread.wait(0.1):
                tick()
        self._raise()

    def stop(self, *, drop: bool, timeout_s: float) -> bool:
        """End early; errors are kept quiet. Says whether the threads have ended.

        Args:
            drop: forget what waits; otherwise it is done first.
            timeout_s: seconds to wait for what is being done.
        """
        with self._change:
            self._closing = True
            if drop:
                self._items.clear()
            self._change.notify_all()
        deadline = time.monotonic() + timeout_s
        ended = [thread.wait(deadline - time.monotonic()) for thread in self._threads]
        return all(ended)

    def _over(self) -> bool:
        return self._closing or self._error is not None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while items := self._take():
            try:
                self._work(items)
            except BaseException as error:
                with self._change:
                    self._error = self._error or error
                    self._items.clear()
                    self._change.notify_all()
                return

    def _take(self) -> list[T]:
        """The next items; empty when there will be none."""
        started = time.perf_counter()
        with self._change:
            while not self._items and not self._over():
                self._change.wait()
            if self._error is not None:
                return []
            count = min(self._at_once, len(self._items))
            taken = [self._items.popleft() for _ in range(count)]
            self._change.notify_all()
        self._idle(time.perf_counter() - started)
        return taken


class Speed:
    """Adds up the seconds that each stage was busy; several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(STAGES, 0.0)
        self._cpu = dict.fromkeys(STAGES, 0.0)
        self._waiting = 0.0
        self.started = time.perf_counter()

    def add(self, stage: str, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Count time of one stage.

        Args:
            stage: one of :data:`STAGES`.
            seconds: on the clock.
            cpu_seconds: of the processor, where it was measured.
        """
        with self._lock:
            self._busy[stage] += seconds
            self._cpu[stage] += cpu_seconds

    def wait(self, seconds: float) -> None:
        """Count time in which the backbone had no pictures."""
        with self._lock:
            self._waiting += seconds

    def report(
        self, *, workers: int, threads: int, cores: int, device: str, images: int
    ) -> SpeedReport:
        """What was counted until now.

        Args:
            workers: decoding processes (0: the main process decoded).
            threads: threads that ran the backbone.
            cores: processor cores that the run may use.
            device: ``cpu``, ``cuda`` or ``mps``.
            images: how many were computed.
        """
        with self._lock:
            seconds = time.perf_counter() - self.started
            side_by_side = {"read + decode": max(1, workers), "copy": threads, "backbone": threads}
            return SpeedReport(
                seconds=seconds,
                busy=dict(self._busy),
                cpu=dict(self._cpu),
                share={s: b / seconds / side_by_side.get(s, 1) for s, b in self._busy.items()},
                waiting=self._waiting / seconds / threads,
                workers=workers,
                threads=threads,
                cores=cores,
                device=device,
                images=images,
            )


@dataclass(frozen=True)
class SpeedReport:
    """How busy each stage of a run was."""

    seconds: float  # from the first image to the last commit
    busy: dict[str, float]  # stage → seconds, added up over processes or threads side by side
    cpu: dict[str, float]  # stage → processor seconds, where they were measured
    share: dict[str, float]  # stage → share of the time that its processes or threads were busy
    waiting: float  # share of the time in which the backbone waited for pictures
    workers: int
    threads: int
    cores: int
    device: str
    images: int

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Stage, busy share, seconds and what worked on it, as text, for a table."""
        who = {
            "read + decode": _counted(self.workers, "process") if self.workers else "main process",
            "backbone": _counted(self.threads, "thread") if self.device == "cpu" else self.device,
            "write": "1 thread",
        }
        return [
            (stage, f"{self.share[stage]:.0%}", f"{self.busy[stage]:.2f}", who.get(stage, ""))
            for stage in STAGES
        ] + [("waiting for pictures", f"{self.waiting:.0%}", "", "the backbone")]

    def bottleneck(self) -> str:
        """One or two sentences: what limited the run, and the flag that changes it."""
        if self.share["write"] > max(0.5, self.share["backbone"]):
            return (
                "The bottleneck is writing: store less (--patches mean or none, --store-dtype float16) "
                "or put --cache-dir on a faster disk."
            )
        return self._on_cpu() if self.device == "cpu" else self._on_gpu()

    def _on_gpu(self) -> str:
        if self.waiting < _WAITING:
            return (
                "The bottleneck is the backbone, as it should be. --compile, a larger --batch-size, a "
                "smaller --image-size or --backbone, or more GPUs (torchrun) change it."
            )
        if self.share["read + decode"] > _BUSY:
            more = (
                f"give more processes with --workers (now {self.workers} on {self.cores} cores)"
                if self.workers < self.cores
                else f"all {self.cores} cores decode; more cores or smaller files help"
            )
            return f"The bottleneck is reading and decoding: {more}."
        return (
            "The bottleneck is reading: pictures come slower than they are decoded. More processes read "
            f"more at once: --workers (now {self.workers})."
        )

    def _on_cpu(self) -> str:
        used = self.cpu["read + decode"], self.cpu["backbone"]
        # Pictures that were decoded while the backbone was loaded count, too.
        total = max(1e-9, self.seconds * self.cores, sum(used))
        decode, backbone = (seconds / total for seconds in used)
        if self.waiting > _WAITING and decode + backbone < _BUSY:
            return (
                "The bottleneck is reading: cores stand idle while pictures are awaited. More processes "
                f"read more at once: --workers (now {self.workers})."
            )
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        shares = f"decoding took {decode:.0%} of {cores}, the backbone {backbone:.0%}"
        if decode + backbone < _BUSY:
            return (
                f"The bottleneck is the processor, which other programs use too ({shares}); a longer run "
                "tells more."
            )
        change = (
            "--device cuda where there is a GPU, a smaller --image-size or --backbone change it"
            if backbone >= decode
            else "--decode fast (for JPEGs), smaller files or more cores change it"
        )
        return f"The bottleneck is the processor ({shares}); {change}."


def _counted(count: int, thing: str) -> str:
    return f"1 {thing}" if count == 1 else f"{count} {thing}{'es' if thing[-1] == 's' else 's'}"
