"""The stages behind decoding: threads that run the backbone, and one that writes what it gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.features.canary import Canary
from mirip_fast.features.forward import Batch, Computed, Forward
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.speed import Speed, SpeedReport
from mirip_fast.features.stages import Stage, StoppedError
from mirip_fast.features.store_writer import StoreWriter

if TYPE_CHECKING:
    from mirip_fast.features.backbone import Backbone

_COMMITTED_AT_ONCE = 8  # batches that one sync may cover
_STOP_SECONDS = 4.0  # for each stage to finish what it is doing when the run is stopped


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
