"""Phase one on a GPU: how near to the card's own speed it comes. `--dry-run` tries the script on a CPU.

For each image size: images per second for several batch sizes, eager and compiled, the share of the card's
measured bf16 matrix rate, peak memory, and how far the features are from float32. Then the whole pipeline on
pictures from disk: images per second and the share of the time in which the GPU waited.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import machine
from embedding import PhaseOne, large, load
from pictures import picture_files
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.backbone import Backbone, load_model
from mirip_fast.features.backbone_files import BackboneSpec


@dataclass
class Bench:
    """What is measured, and on what."""

    device: torch.device
    spec: BackboneSpec
    model: nn.Module  # float32, on the CPU
    seconds: float  # of each measurement

    def backbone(self, precision: str, *, compiled: bool = False) -> Backbone:
        """A fresh backbone on the device."""
        torch._dynamo.reset()
        backbone = Backbone(self.spec, copy.deepcopy(self.model), self.device, precision)
        if compiled:
            backbone.compile()
        return backbone

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, action: Callable[[], object]) -> float:
        """Calls per second, after three to warm up; the best of three stretches."""
        for _ in range(3):
            action()
        self.synchronise()
        best = 0.0
        for _ in range(3):
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < self.seconds / 3:
                for _ in range(4):
                    action()
                count += 4
                self.synchronise()
            best = max(best, count / (time.perf_counter() - started))
        return best


def matrix_rate(bench: Bench, precision: torch.dtype) -> float:
    """The best of the device's measured matrix products, in operations per second."""
    sizes = (4096, 8192, 16384) if bench.device.type == "cuda" else (512,)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=bench.device, dtype=precision) for _ in range(2))
        out = torch.empty_like(a)
        best = max(best, 2 * n**3 * bench.rate(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    return best


def operations(bench: Bench, size: int) -> int:
    """Floating-point operations of one image's pass (a multiplication and an addition are two)."""
    with torch.device("meta"):
        pixels = torch.empty(1, 3, size, size)
    model = copy.deepcopy(bench.model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        Backbone.tokens(_OnMeta(bench.spec, model), pixels)
    return counter.get_total_flops()


class _OnMeta(Backbone):
    """A backbone without numbers, to count with."""

    def __init__(self, spec: BackboneSpec, model: nn.Module):
        self.spec, self.model = spec, model.eval()


def forward_table(
    bench: Bench, sizes: list[int], batch_sizes: list[int], peak: float, precision: str
) -> None:
    """Images per second, share of the matrix rate and peak memory."""
    rows = []
    for size in sizes:
        flops = operations(bench, size)
        for compiled in (False, True):
            for batch in batch_sizes:
                rows.append(_forward_row(bench, size, batch, compiled, flops, peak, precision))
                print(" ", *rows[-1], flush=True)
    header = ("pixels", "batch", "code", "images/s", "share of matrix rate", "peak memory, GiB")
    print("\n" + format_table(header, rows, align="rrlrrr"))


def _forward_row(
    bench: Bench, size: int, batch: int, compiled: bool, flops: int, peak: float, precision: str
) -> tuple[str, ...]:
    label = (str(size), str(batch), "compiled" if compiled else "eager")
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        backbone = bench.backbone(precision, compiled=compiled)
        images = torch.randint(
            0, 256, (batch, size, size, 3), dtype=torch.uint8, device=bench.device
        )
        with torch.inference_mode():
            per_second = batch * bench.rate(lambda: backbone.tokens(backbone.normalise(images)))
    except torch.OutOfMemoryError:
        return (*label, "out of memory", "", "")
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
    return (*label, f"{per_second:.1f}", f"{per_second * flops / peak:.1%}", f"{memory:.2f}")


def exactness(bench: Bench, sizes: list[int], precision: str, batch: int) -> None:
    """How far the features are from float32's, as |a − b| / |b| of the CLS token and the patches' mean."""
    rows = []
    for size in sizes:
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
        features = {}
        for name, kind, compiled in (
            ("fp32", "fp32", False),
            ("eager", precision, False),
            ("compiled", precision, True),
        ):
            backbone = bench.backbone(kind, compiled=compiled)
            with torch.inference_mode():
                cls, patches = backbone.tokens(backbone.normalise(images))
                features[name] = [cls.float().cpu(), patches.float().mean(dim=(1, 2)).cpu()]
            del backbone
        for name in ("eager", "compiled"):
            errors = [
                float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
                for a, b in zip(features[name], features["fp32"], strict=True)
            ]
            rows.append((str(size), f"{precision} {name}", *(f"{error:.2e}" for error in errors)))
    header = ("pixels", "computed in", "CLS, worst of batch", "mean, worst of batch")
    print(f"\ndifference from float32, {batch} images of noise")
    print(format_table(header, rows, align="rlrr"))


def end_to_end(
    bench: Bench, sizes: list[int], paths: list[Path], folder: Path, precision: str, compiled: bool
) -> None:
    """Files on disk → committed rows: images per second, and how long the GPU waited."""
    rows = []
    for size in sizes:
        backbone = bench.backbone(precision, compiled=compiled)
        phase = PhaseOne(bench.spec, backbone, size, folder / "store", precision)
        phase.run(paths[: max(8, len(paths) // 20)])  # warm: compiled code, memory, page cache
        started = time.perf_counter()
        phase.run(paths)
        seconds = time.perf_counter() - started
        report = phase.speed
        assert report is not None
        share = {stage: f"{value:.0%}" for stage, value in report.share.items()}
        rows.append(
            (
                str(size), f"{len(paths) / seconds:.1f}", f"{1 - report.share['backbone']:.1%}",
                share["read + decode"], share["copy"], share["copy back"], share["write"],
                str(report.workers),
            )
        )  # fmt: skip
        print(f"{size}: {report.bottleneck()}", flush=True)
    header = (
        "pixels",
        "images/s",
        "device idle",
        "decode busy",
        "copy",
        "copy back",
        "write",
        "workers",
    )
    print("\nend to end, files on disk → committed rows")
    print(format_table(header, rows, align="rrrrrrrr"))


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--data", type=Path, help="folder of pictures (default: generated ones)")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures for end to end")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518, 756])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument(
        "--backbone", help="folder of a backbone (default: DINOv2-Large, random weights)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--compiled", action="store_true", help="end to end with compiled code")
    arguments = parser.parse_args()
    if arguments.dry_run:
        device, precision = torch.device("cpu"), "fp32"
        spec, backbone = load(arguments.backbone or "tiny-random")
        model: nn.Module = backbone.model
        arguments.sizes, arguments.batch_sizes = [28, 56], [1, 4]
        arguments.pictures, arguments.seconds = min(arguments.pictures, 40), 0.2
    else:
        if not torch.cuda.is_available():
            raise SystemExit("There is no GPU here; try the script with --dry-run")
        device, precision = torch.device("cuda", 0), "bf16"
        if arguments.backbone:
            spec = load(arguments.backbone)[0]
            model = load_model(spec)
        else:
            spec, model = large()
    print(machine())
    bench = Bench(device, spec, model, arguments.seconds)
    peak = matrix_rate(bench, torch.bfloat16 if precision == "bf16" else torch.float32)
    print(f"{spec.name}; measured matrix rate in {precision}: {peak / 1e12:.4g} TFLOP/s")
    forward_table(bench, arguments.sizes, arguments.batch_sizes, peak, precision)
    exactness(bench, arguments.sizes, precision, min(8, max(arguments.batch_sizes)))
    with tempfile.TemporaryDirectory() as folder:
        paths = picture_files(arguments.data, Path(folder) / "pictures", arguments.pictures)
        end_to_end(bench, arguments.sizes, paths, Path(folder), precision, arguments.compiled)


if __name__ == "__main__":
    main()
