"""The backbone at work: batches of decoded pictures in, rows of features out, in threads of their own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoppedError
from mirip_fast.features.canary import check_canary
from mirip_fast.features.recipe import Need, Recipe, sizes_of
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.runtime import WorkThread, in_passes, keep_freed_memory

if TYPE_CHECKING:
    import torch

    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)

T = TypeVar("T")
Rows = dict[SeriesSpec, NDArray[Any]]  # per series [n, \\*shape] in the stored number format
Images = Sequence[tuple[NDArray[np.uint8], ...]]  # per picture a square per size
#: What pictures lack, which is the same for all; their hashes; and the squares that it needs.
Batch = tuple[Need, Sequence[bytes], Images]
#: The hashes of a batch, and what waits until its rows have come from the device.
Computed = tuple[Sequence[bytes], Callable[[], Rows]]

#: The stages, in the order of an image's way through them.
STAGES = ("read + decode", "copy", "backbone", "copy back", "write")
_MOST_WORKERS = 8  # threads that run the backbone on a CPU; further cores help within each
_COMMITTED_AT_ONCE = 8  # batches that one sync may cover
_STOP_SECONDS = 4.0  # for each stage to finish what it is doing when the run is stopped
_BUSY = 0.7  # from this share of its time on, something is the limit
_WAITING = 0.15


class Forward:
    """Runs batches through a backbone; several threads may use it side by side.

    Args:
        backbone: loaded.
        recipe: its views, kinds and stored number format are used.
        batch_size: images per pass; None takes :func:`default_batch_size`.
        speed: told how long everything took.

    Attributes:
        batch_size: images per pass; halved for the rest of the run when memory runs out.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, batch_size: int | None, speed: Speed):
        self._backbone, self._recipe, self._speed = backbone, recipe, speed
        self.batch_size = batch_size or default_batch_size(recipe, backbone.device)
        self._lock = threading.Lock()
        self._transfer = _CudaTransfer(backbone.device, speed) if _is_cuda(backbone) else None

    def run(self, batch: Batch) -> list[Computed]:
        """Features of a batch, in one piece unless memory runs out."""
        need, hashes, images = batch

        def part(rows: range) -> Computed:
            here = slice(rows.start, rows.stop)
            return self._pass(need, hashes[here], images[here])

        return in_passes(part, range(len(hashes)), self.batch_size, self._smaller)[0]

    def _smaller(self, size: int) -> None:
        with self._lock:
            if size < self.batch_size:
                self.batch_size = size
                log.warning("Out of memory: going on with batches of %d images", size)

    def _pass(self, need: Need, hashes: Sequence[bytes], images: Images) -> Computed:
        import torch

        full = self.batch_size if self._backbone.compiled else len(hashes)
        with torch.inference_mode():
            if self._transfer is not None:
                return self._transfer.run(need, hashes, images, self._features, full)
            started = time.perf_counter()
            squares = _stack(images, full)
            copied = time.perf_counter()
            cpu_started = time.thread_time()
            device = self._backbone.device
            features = self._features(need, [torch.from_numpy(s).to(device) for s in squares])
            rows = {spec: t[: len(hashes)].cpu().numpy() for spec, t in features.items()}
        self._speed.add("copy", copied - started)
        self._speed.add("backbone", time.perf_counter() - copied, time.thread_time() - cpu_started)
        return hashes, lambda: rows

    def _features(
        self, need: Need, squares: Sequence[torch.Tensor]
    ) -> dict[SeriesSpec, torch.Tensor]:
        """One pass per view; every wanted kind of token from it."""
        import torch

        dtype = getattr(torch, self._recipe.store_dtype)
        sizes = sizes_of(need)
        result: dict[SeriesSpec, torch.Tensor] = {}
        for view in dict.fromkeys(view for view, _, _ in need):
            pixels = self._backbone.normalise(squares[sizes.index(view.size)])
            wanted = {kind: spec for of_view, kind, spec in need if of_view == view}
            rows = self._backbone.features(pixels.flip(-1) if view.flip else pixels, list(wanted))
            result.update((wanted[k], row.to(dtype).contiguous()) for k, row in rows.items())
        return result


class Engine:
    """The stages behind decoding: the backbone, and writing what it gives.

    On a CPU several threads run the backbone side by side, each a small batch with its share of the cores:
    they never wait for each other, which the threads inside one operation would do, above all while
    decoders use the same cores.

    Args:
        backbone: loaded.
        recipe: its views, kinds and stored number format are used.
        writer: where the rows go.
        batch_size: images per pass; None takes :func:`default_batch_size`.
        complete: told which contents have their rows by now, or why not; called from a thread.
        speed: told how long everything took, and which threads worked.

    Attributes:
        forward: runs the backbone.
        done: images committed, or failed in the backbone.

    Raises:
        StoreError: the features of the built-in picture are not those of the store.
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        writer: StoreWriter,
        batch_size: int | None,
        complete: Callable[[Sequence[bytes], Mapping[bytes, str]], None],
        speed: Speed,
    ):
        self._backbone, self._recipe, self._writer = backbone, recipe, writer
        self._complete, self._speed = complete, speed
        self.forward = Forward(backbone, recipe, batch_size, speed)
        self.done = 0
        self._stop = threading.Event()
        cpu = backbone.device.type == "cpu"
        speed.device = backbone.device.type
        speed.threads = min(speed.cores, _MOST_WORKERS) if cpu and not backbone.compiled else 1
        self._prepare()
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:  # before any thread has rows to write; compiled code is made for one shape
            copies = self.forward.batch_size if backbone.compiled else 1
            check_canary(writer.store.path, recipe, backbone, copies)
        except BaseException:
            self._undo.close()
            raise
        speed.add("backbone", time.perf_counter() - started, time.thread_time() - cpu_started)
        self._write = Stage(
            "mirip-write", self._commit, room=2 * speed.threads, at_once=_COMMITTED_AT_ONCE
        )
        self._compute: Stage[Batch] = Stage(
            "mirip-compute",
            self._run,
            threads=speed.threads,
            room=speed.threads + 1,
            idle=speed.wait,
        )

    def put(self, batch: Batch) -> None:
        """Hand over a batch; waits for room. Raises what went wrong in any stage."""
        self._compute.put(batch)

    def finish(self, tick: Callable[[], None]) -> None:
        """Wait until everything is committed. Raises what went wrong in any stage."""
        self._compute.finish(tick)
        self._write.finish(tick)
        self._undo.close()

    def stop(self) -> None:
        """End soon: what is computed is still committed, the rest is dropped."""
        self._stop.set()
        self._compute.stop(drop=True, timeout_s=_STOP_SECONDS)
        self._write.stop(drop=False, timeout_s=_STOP_SECONDS)
        self._undo.close()

    def _prepare(self) -> None:
        """Divide the processor among the threads, and let passes end soon once the run is stopped.

        One pass of a large backbone may take many seconds on a CPU: it is broken off between two
        operations, by StoppedError. Compiled code has no places to stop at, and a GPU needs none.
        """
        import torch

        self._undo = contextlib.ExitStack()
        if self._backbone.device.type == "cpu":
            keep_freed_memory()
            self._undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(max(1, self._speed.cores // self._speed.threads))
            for module in () if self._backbone.compiled else self._backbone.model.modules():
                if not list(module.children()):
                    hook = module.register_forward_pre_hook(self._end_if_stopped)
                    self._undo.callback(hook.remove)

    def _end_if_stopped(self, *_: Any) -> None:
        if self._stop.is_set():
            raise StoppedError

    def _run(self, batches: list[Batch]) -> None:
        for batch in batches:
            for computed in self.forward.run(batch):
                self._write.put(computed)

    def _commit(self, batches: list[Computed]) -> None:
        alike: dict[tuple[SeriesSpec, ...], tuple[list[bytes], list[Rows]]] = {}
        for some, wait in batches:
            rows = wait()
            hashes, parts = alike.setdefault(tuple(rows), ([], []))
            hashes.extend(some)
            parts.append(rows)
        started, cpu = time.perf_counter(), time.thread_time()
        for specs, (hashes, parts) in alike.items():
            self._append(hashes, {s: np.concatenate([part[s] for part in parts]) for s in specs})
        self._speed.add("write", time.perf_counter() - started, time.thread_time() - cpu)

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


class _CudaTransfer:
    """Copies to and from the GPU on streams of their own, through pinned memory, while it computes.

    Pinned blocks are recycled by torch's allocator once the copies that use them are done. How far the
    GPU's queue runs ahead is bounded by the stage that waits for the results.
    """

    def __init__(self, device: torch.device, speed: Speed):
        import torch

        self._device, self._speed = device, speed
        self._in: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(
        self,
        need: Need,
        hashes: Sequence[bytes],
        images: Images,
        features: Callable[[Need, Sequence[torch.Tensor]], dict[SeriesSpec, torch.Tensor]],
        full: int,
    ) -> Computed:
        """Queue everything for one batch on the GPU; returns at once."""
        import torch

        torch.cuda.set_device(self._device)  # of this thread
        compute = torch.cuda.current_stream()
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(6)]
        started = time.perf_counter()
        pinned = [
            torch.empty((full, size, size, 3), dtype=torch.uint8, pin_memory=True)
            for size in sizes_of(need)
        ]
        _stack(images, full, [tensor.numpy() for tensor in pinned])
        self._speed.add("copy", time.perf_counter() - started)
        with torch.cuda.stream(self._in):
            marks[0].record()
            squares = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            marks[1].record()
        compute.wait_event(marks[1])
        for square in squares:
            square.record_stream(compute)
        marks[2].record()
        results = features(need, squares)
        marks[3].record()
        with torch.cuda.stream(self._out):
            self._out.wait_event(marks[3])
            marks[4].record()
            rows = {}
            for spec, tensor in results.items():
                rows[spec] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                rows[spec].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
            marks[5].record()
        n = len(hashes)

        def wait() -> Rows:
            marks[5].synchronize()
            for stage, i in (("copy", 0), ("backbone", 2), ("copy back", 4)):
                self._speed.add(stage, marks[i].elapsed_time(marks[i + 1]) / 1000)
            # Copied: pinned memory is scarce, and belongs to the next batch.
            return {spec: tensor[:n].numpy().copy() for spec, tensor in rows.items()}

        return hashes, wait


def _stack(
    images: Images, full: int, out: Sequence[NDArray[np.uint8]] | None = None
) -> list[NDArray[np.uint8]]:
    """Per size [full, size, size, 3]; the last picture fills up what is left over."""
    images = [*images, *[images[-1]] * (full - len(images))]
    return [
        np.stack([image[i] for image in images], out=out[i] if out else None)
        for i in range(len(images[0]))
    ]


def default_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Images per forward pass when none is given: a fixed budget of tokens per pass.

    A CPU gains nothing from more than a thousand tokens (measured with ViT-Tiny: four images of 224 pixels
    take as long per image as 32), and small batches end together. On a GPU the budget keeps DINOv2-Large
    under about 8 GiB, and a GPU that has less halves the batch by itself.
    """
    side = max(view.size for view in recipe.views) // recipe.backbone.patch_size
    budget, most = (1_024, 32) if device.type == "cpu" else (131_072, 256)
    return max(1, min(most, budget // (side * side + 1)))


def _is_cuda(backbone: Backbone) -> bool:
    return backbone.device.type == "cuda"


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


@dataclass
class Speed:
    """How busy each stage of a run was; several threads may add to it."""

    workers: int = 1  # decoding processes; 0: the main process decodes
    cores: int = 1  # that the run may use
    threads: int = 1  # that run the backbone
    device: str = "cpu"
    images: int = 0  # that were computed
    seconds: float = 0.0  # from the first image to the last commit
    #: Stage → seconds, added up over processes or threads side by side; and those of the processor.
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    cpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waited: float = 0.0  # seconds in which threads had no pictures
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, stage: str, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Count time of one of :data:`STAGES`: on the clock, and of the processor where it was measured."""
        with self._lock:
            self.busy[stage] += seconds
            self.cpu[stage] += cpu_seconds

    def wait(self, seconds: float) -> None:
        """Count time in which the backbone had no pictures."""
        with self._lock:
            self.waited += seconds

    @property
    def share(self) -> dict[str, float]:
        """Stage → share of the time that its processes or threads were busy."""
        beside = {"read + decode": max(1, self.workers)}
        beside |= dict.fromkeys(("copy", "backbone"), self.threads)
        return {s: b / self.seconds / beside.get(s, 1) for s, b in self.busy.items()}

    @property
    def waiting(self) -> float:
        """Share of the time in which the backbone waited for pictures."""
        return self.waited / self.seconds / self.threads

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Stage, busy share, seconds and what worked on it, as text, for a table."""
        who = {
            "read + decode": _counted(self.workers, "process") if self.workers else "main process",
            "backbone": _counted(self.threads, "thread") if self.device == "cpu" else self.device,
            "write": "1 thread",
        }
        return [
            (stage, f"{share:.0%}", f"{self.busy[stage]:.2f}", who.get(stage, ""))
            for stage, share in self.share.items()
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
