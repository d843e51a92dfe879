"""The backbone at work: batches of decoded pictures in, rows of features out."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import BackboneError, StoppedError
from mirip_fast.features.needs import Need, sizes_of
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.runtime import is_out_of_memory, keep_freed_memory

if TYPE_CHECKING:
    import torch

    from mirip_fast.features.backbone import Backbone
    from mirip_fast.features.engine import Speed

log = logging.getLogger(__name__)

#: Threads that run the backbone side by side on a CPU, at most; further cores help within each.
MOST_WORKERS = 8


@dataclass(frozen=True)
class Batch:
    """Pictures that lack the same series."""

    need: Need
    hashes: Sequence[bytes]
    images: Sequence[tuple[NDArray[np.uint8], ...]]  # per picture a square per size of the need

    def parts(self, size: int) -> Iterator[Batch]:
        """The same pictures in batches of at most ``size``."""
        for start in range(0, len(self.hashes), size):
            end = start + size
            yield Batch(self.need, self.hashes[start:end], self.images[start:end])


@dataclass(frozen=True)
class Computed:
    """Features of a batch, perhaps still on their way from the device."""

    hashes: Sequence[bytes]
    #: Waits for the device; per series [n, \*shape] in the stored number format.
    rows: Callable[[], dict[SeriesSpec, NDArray[Any]]]


class Forward:
    """Runs batches through a backbone; several threads may use it side by side.

    On a CPU each worker computes one small batch with its share of the cores: workers never wait for each
    other, which the threads inside one operation would do, above all while decoders use the same cores.

    Args:
        backbone: the loaded backbone.
        recipe: its views, kinds and stored number format are used.
        cores: processor cores that the run may use.
        batch_size: pictures per pass; None takes :func:`default_batch_size`.
        speed: told how long everything took.

    Attributes:
        workers: how many threads should call :meth:`run`.
        threads: processor threads for the operations of each.
        batch_size: pictures per pass; halved for the rest of the run when memory runs out.
    """

    def __init__(
        self, backbone: Backbone, recipe: Recipe, cores: int, batch_size: int | None, speed: Speed
    ):
        self.backbone = backbone
        self._dtype = recipe.store_dtype
        self._speed = speed
        cpu = backbone.device.type == "cpu"
        self.workers = min(cores, MOST_WORKERS) if cpu and not backbone.compiled else 1
        self.threads = max(1, cores // self.workers) if cpu else None
        self.batch_size = batch_size or default_batch_size(recipe, backbone.device)
        self._full = self.batch_size  # compiled code is made for one shape
        self._lock = threading.Lock()
        self._transfer = _CudaTransfer(backbone.device, speed) if _is_cuda(backbone) else None

    def run(self, batch: Batch) -> Iterator[Computed]:
        """Features of a batch, in one piece unless memory runs out."""
        for part in batch.parts(self.batch_size):
            try:
                done = self._compute(part)
            except Exception as error:
                if not is_out_of_memory(error) or len(part.hashes) == 1:
                    raise
            else:
                yield done
                continue
            self._halve(len(part.hashes))
            yield from self.run(part)

    def _halve(self, tried: int) -> None:
        with self._lock:
            if tried <= self.batch_size:
                self.batch_size = self._full = max(1, tried // 2)
                log.warning("Out of memory: going on with batches of %d images", self.batch_size)
        _free_memory(self.backbone.device)

    def _compute(self, batch: Batch) -> Computed:
        import torch

        with torch.inference_mode():
            if self._transfer is not None:
                return self._transfer.run(batch, self._features, self._full_size(batch))
            started = time.perf_counter()
            squares = _stack(batch, self._full_size(batch))
            copied = time.perf_counter()
            cpu_started = time.thread_time()
            device = self.backbone.device
            features = self._features(batch.need, [torch.from_numpy(s).to(device) for s in squares])
            rows = {spec: t[: len(batch.hashes)].cpu().numpy() for spec, t in features.items()}
        self._speed.add("copy", copied - started)
        self._speed.add("backbone", time.perf_counter() - copied, time.thread_time() - cpu_started)
        return Computed(batch.hashes, lambda: rows)

    def _full_size(self, batch: Batch) -> int:
        return self._full if self.backbone.compiled else len(batch.hashes)

    def _features(
        self, need: Need, squares: Sequence[torch.Tensor]
    ) -> dict[SeriesSpec, torch.Tensor]:
        """One pass per view; every wanted kind of token from it."""
        import torch

        dtype = getattr(torch, self._dtype)
        sizes = sizes_of(need)
        result: dict[SeriesSpec, torch.Tensor] = {}
        for view in dict.fromkeys(view for view, _, _ in need):
            pixels = self.backbone.normalise(squares[sizes.index(view.size)])
            wanted = {kind: spec for of_view, kind, spec in need if of_view == view}
            rows = self._pass(pixels.flip(-1) if view.flip else pixels, list(wanted))
            result.update((wanted[k], row.to(dtype).contiguous()) for k, row in rows.items())
        return result

    def _pass(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        try:
            return self.backbone.features(pixels, kinds)
        except Exception as error:
            if not self.backbone.compiled or is_out_of_memory(error):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"--compile does not work here ({first}); the same command without it does"
            ) from error

    @property
    def shape_of_one(self) -> int:
        """Pictures in the smallest batch: compiled code is made for one size."""
        return self._full if self.backbone.compiled else 1

    def prepare(self, stop: threading.Event) -> Callable[[], None]:
        """Divide the processor among the workers, and let passes end soon once ``stop`` is set.

        One pass of a large backbone may take many seconds on a CPU: it is broken off between two
        operations, by StoppedError. Compiled code has no places to stop at, and a GPU needs none.

        Returns:
            What undoes it.
        """
        import torch

        undo = contextlib.ExitStack()
        if self.threads is not None:
            keep_freed_memory()
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            if not self.backbone.compiled:
                for module in self.backbone.model.modules():
                    if not list(module.children()):
                        undo.callback(module.register_forward_pre_hook(_stopping(stop)).remove)
        return undo.close


def _stopping(stop: threading.Event) -> Callable[..., None]:
    def check(*_: Any) -> None:
        if stop.is_set():
            raise StoppedError

    return check


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
        batch: Batch,
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
            for size in sizes_of(batch.need)
        ]
        _stack(batch, full, [tensor.numpy() for tensor in pinned])
        self._speed.add("copy", time.perf_counter() - started)
        with torch.cuda.stream(self._in):
            marks[0].record()
            squares = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            marks[1].record()
        compute.wait_event(marks[1])
        for square in squares:
            square.record_stream(compute)
        marks[2].record()
        results = features(batch.need, squares)
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
        n = len(batch.hashes)

        def wait() -> dict[SeriesSpec, NDArray[Any]]:
            marks[5].synchronize()
            for stage, i in (("copy", 0), ("backbone", 2), ("copy back", 4)):
                self._speed.add(stage, marks[i].elapsed_time(marks[i + 1]) / 1000)
            # Copied: pinned memory is scarce, and belongs to the next batch.
            return {spec: tensor[:n].numpy().copy() for spec, tensor in rows.items()}

        return Computed(batch.hashes, wait)


def _stack(
    batch: Batch, full: int, out: Sequence[NDArray[np.uint8]] | None = None
) -> list[NDArray[np.uint8]]:
    """Per size [full, size, size, 3]; the last picture fills up what is left over."""
    images = [*batch.images, *[batch.images[-1]] * (full - len(batch.images))]
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


def _free_memory(device: torch.device) -> None:
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
