"""Where the time of an embedding run went, and what would make it faster."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

#: The stages, in the order of an image's way through them.
STAGES = ("read + decode", "copy", "backbone", "copy back", "write")
_BUSY = 0.7  # from this share of its time on, something is the limit
_WAITING = 0.15


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
