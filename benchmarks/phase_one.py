"""Phase one against the limits of the machine: `python benchmarks/phase_one.py --help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import Line, in_turns, machine, measured, show
from embedding import (
    CPU,
    PhaseOne,
    Pipeline,
    Stub,
    bare_decode,
    bare_forward,
    batches,
    large,
    load,
    plain_loop,
)
from pictures import picture_files, small_pictures, twelve_megapixels

from mirip_fast.features import shards
from mirip_fast.features.backbone import Backbone
from mirip_fast.features.engine import default_batch_size
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.runtime import usable_cores

CORES = usable_cores()


def large_backbone(arguments: argparse.Namespace, folder: Path) -> None:
    """(a) End to end against the bare forward pass, where the backbone dominates."""
    spec, model = large()
    backbone = Backbone(spec, model, CPU, "fp32")
    phase = PhaseOne(spec, backbone, 224, folder / "large")
    n = arguments.large_images
    paths = picture_files(arguments.data, folder / "pictures", n)
    size = default_batch_size(phase.recipe, CPU)
    ready = batches(backbone, bare_decode(paths[: max(size, n // 4)], 224), size)
    bare_forward(backbone, ready[:1], CORES)
    costs = in_turns(1, before=lambda: bare_forward(backbone, ready, CORES))
    with measured() as ours:
        phase.run(paths)
    costs |= in_turns(1, after=lambda: bare_forward(backbone, ready, CORES))
    count = sum(len(batch) for batch in ready)
    bare = (costs["before"].wall + costs["after"].wall) / (2 * count)
    bare_cpu = (costs["before"].cpu + costs["after"].cpu) / (2 * count)
    assert phase.speed is not None
    show(
        f"(a) DINOv2-Large architecture, random weights, 224 pixels, {len(paths)} pictures",
        [
            Line(f"bare forward, {CORES} threads", bare, "s per picture"),
            Line("end to end", ours.wall / len(paths), "s per picture"),
            Line("end to end ÷ bare forward", ours.wall / len(paths) / bare, most=1.03),
            Line("the same in processor seconds", ours.cpu / len(paths) / bare_cpu),
            Line("of it the test picture, one per run", 1 / len(paths)),
            Line("of it writing durably (thread beside)", phase.speed.busy["write"] / ours.wall),
        ],
    )


def rivals(arguments: argparse.Namespace, folder: Path) -> None:
    """(b) End to end against the machine's limit, and against two other ways."""
    _, backbone = load(arguments.backbone)
    paths = picture_files(arguments.data, folder / "pictures", arguments.pictures)
    few = paths[: arguments.big_pictures]
    print(f"\nUpscaling {len(few)} pictures to 12 megapixels …", flush=True)
    big = twelve_megapixels(few, folder / "big")
    # Before phase one runs: from then on the process keeps freed memory, which would help them too.
    others = [_others(backbone, some, arguments, folder) for some in (paths, big)]
    title = "(b) the pictures as they are"
    _rivals(title, backbone, paths, others[0], arguments, folder, 1.0)
    title = "(b) the same at 12 megapixels, JPEG 90"
    _rivals(title, backbone, big, others[1], arguments, folder, 3.0)


def _others(
    backbone: Backbone, paths: list[Path], arguments: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Seconds that other ways take."""
    file = folder / "plain.h5"
    actions = {"loop": lambda: plain_loop(backbone, paths, arguments.size, file, 32)}
    if backbone.spec.folder is not None:
        pipeline = Pipeline(backbone.spec.folder, backbone.model)
        actions["pipeline"] = lambda: pipeline.run(paths, 32)
    return {name: cost.wall for name, cost in in_turns(arguments.rounds, **actions).items()}


def _rivals(
    title: str, backbone: Backbone, paths: list[Path], others: dict[str, float],
    arguments: argparse.Namespace, folder: Path, least: float,
) -> None:  # fmt: skip
    phase = PhaseOne(backbone.spec, backbone, arguments.size, folder / "ours")
    size = default_batch_size(phase.recipe, CPU)
    some = paths[:: max(1, len(paths) // 64)]  # a forward pass costs the same for every picture
    ready = batches(backbone, bare_decode(some, arguments.size), size)
    actions = {
        "ours": lambda: phase.run(paths),
        "decode": lambda: bare_decode(paths, arguments.size),
        "forward": lambda: bare_forward(backbone, ready, 1),
    }
    bare_forward(backbone, ready, 1)  # warm
    costs = in_turns(arguments.rounds, **actions)
    decode, forward = costs["decode"].cpu / len(paths), costs["forward"].cpu / len(some)
    ours = costs["ours"]
    limit = (decode + forward) * len(paths) / CORES
    lines = [
        Line("bare decoding, one thread", 1000 * decode, "ms per picture"),
        Line("bare forward, one thread", 1000 * forward, "ms per picture"),
        Line("end to end", len(paths) / ours.wall, "pictures/s"),
        Line(
            "end to end ÷ limit (bare, all cores)",
            ours.wall / limit,
            most=1.10 if least == 1 else None,
        ),
        Line("processor seconds ÷ bare ones", ours.cpu / (limit * CORES)),
        Line("DataLoader + loop + h5py", len(paths) / others["loop"], "pictures/s"),
    ]
    if "pipeline" in others:
        lines.append(Line("transformers.pipeline", len(paths) / others["pipeline"], "pictures/s"))
    lines.append(
        Line("times the faster of the others", min(others.values()) / ours.wall, least=least)
    )
    show(f"{title}: {len(paths)} pictures, {backbone.spec.name}, {arguments.size} pixels", lines)
    if phase.speed is not None:
        print(phase.speed.bottleneck())


def reading(arguments: argparse.Namespace, folder: Path) -> None:
    """(c) Cached rows into memory against reading the bytes."""
    rows, width = arguments.rows, 1024
    store = FeatureStore.create(folder / "reading", {"benchmark": "reading"})
    spec = SeriesSpec("cls.224", (width,), "float16")
    rng, hashes = np.random.default_rng(0), []
    with StoreWriter(store) as writer:
        for start in range(0, rows, 4096):
            n = min(4096, rows - start)
            part = [rng.bytes(32) for _ in range(n)]
            hashes += part
            writer.append(part, {spec: rng.standard_normal((n, width)).astype("f2")})
    store.refresh()
    shards = store.shards(spec.name)
    numbers = store.rows(spec.name, hashes)

    def raw() -> None:
        data = np.empty((rows, width), "f2")
        view, done = data.reshape(-1).view(np.uint8).data, 0
        for shard in shards:
            with shard.path.open("rb", buffering=0) as stream:
                stream.seek(shard.features_at)
                size = min(shard.rows * spec.row_bytes, len(view) - done)
                while size:
                    count = stream.readinto(view[done : done + size])
                    done, size = done + count, size - count

    def whole() -> None:
        fresh = FeatureStore.open(store.path)
        fresh.read(spec.name, fresh.rows(spec.name, hashes))

    raw()
    costs = in_turns(
        2 * arguments.rounds + 1, raw=raw, read=lambda: store.read(spec.name, numbers), whole=whole
    )
    show(
        f"(c) {rows} cached CLS rows of {width} float16 into memory, warm",
        [
            Line("reading the bytes", costs["raw"].wall, "s"),
            Line(
                "reading the rows ÷ reading the bytes",
                costs["read"].wall / costs["raw"].wall,
                most=1.2,
            ),
            Line(
                "opening, finding and reading them ÷ the bytes",
                costs["whole"].wall / costs["raw"].wall,
            ),
        ],
    )


def second_run(arguments: argparse.Namespace, folder: Path) -> None:
    """(d) The whole command on a folder in which nothing changed."""
    small_pictures(folder / "many", arguments.files)
    small_pictures(folder / "one", 1)
    command = [sys.executable, "-m", "mirip_fast_cli", "embed"]
    options = [
        "--backbone",
        "tiny-random",
        "--image-size",
        "28",
        "--cache-dir",
        str(folder / "cache"),
    ]

    def run(name: str) -> None:
        subprocess.run([*command, str(folder / name), *options], check=True, capture_output=True)

    time.sleep(2.1)  # files younger than two seconds are not remembered
    with measured() as first:
        run("many")
    run("one")
    costs = in_turns(arguments.rounds, many=lambda: run("many"), one=lambda: run("one"))
    beyond = costs["many"].wall - costs["one"].wall
    show(
        f"(d) mirip-fast embed again, {arguments.files} unchanged files",
        [
            Line("the first run (tiny-random, tiny pictures)", first.wall, "s"),
            Line("start-up (one file, nothing to do)", costs["one"].wall, "s"),
            Line("beyond start-up", beyond, "s", most=2.0),
            Line("the same in processor time", costs["many"].cpu - costs["one"].cpu, "s"),
        ],
    )


def durability(arguments: argparse.Namespace, folder: Path) -> None:
    """(e) What checksums and waiting for the disk cost, with a backbone that takes no time."""
    spec, _ = load("tiny-random")
    spec = dataclasses.replace(spec, hidden_size=1024)
    phase = PhaseOne(spec, Stub(spec), 28, folder / "stub")
    paths = small_pictures(folder / "stubs", arguments.stub_files)

    @contextlib.contextmanager
    def careless() -> Iterator[None]:
        def no_sums(series: str, hashes: np.ndarray, features: np.ndarray) -> np.ndarray:
            return np.ones(len(hashes), "<u8")

        with (
            mock.patch.object(shards, "sync_data", lambda handle: None),
            mock.patch.object(shards, "row_checksums", no_sums),
        ):
            yield

    def without() -> None:
        with careless():
            phase.run(paths)

    costs = in_turns(arguments.rounds, durable=lambda: phase.run(paths), careless=without)
    durable, plain = (len(paths) / costs[k].wall for k in ("durable", "careless"))
    show(
        f"(e) {len(paths)} tiny pictures, a backbone that takes no time, 1024-wide CLS and mean",
        [
            Line("with checksums and a sync per commit", durable, "pictures/s"),
            Line("without both", plain, "pictures/s"),
            Line("without ÷ with", plain / durable),
        ],
    )
    _append_only(folder)


def _append_only(folder: Path) -> None:
    """The writer alone."""
    store = FeatureStore.create(folder / "append", {"benchmark": "append"})
    specs = [SeriesSpec(f"{kind}.224", (1024,), "float16") for kind in ("cls", "mean")]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((256, 1024)).astype("f2")
    lines = []
    with StoreWriter(store) as writer:
        writer.append([rng.bytes(32)], dict.fromkeys(specs, rows[:1]))  # makes the shards
        for size in (4, 32, 256):
            parts = [[rng.bytes(32) for _ in range(size)] for _ in range(1024 // size)]
            with measured() as cost:
                for part in parts:
                    writer.append(part, dict.fromkeys(specs, rows[:size]))
            lines.append(Line(f"the writer alone, commits of {size}", 1024 / cost.wall, "rows/s"))
    show("(e) committed rows per second (CLS and mean of 1024 float16)", lines)


PARTS = {
    "a": large_backbone,
    "b": rivals,
    "c": reading,
    "d": second_run,
    "e": durability,
}


def main() -> None:
    """Run the chosen parts in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of pictures (default: generated ones)")
    parser.add_argument("--backbone", default="tiny-random", help="folder of the backbone for (b)")
    parser.add_argument("--size", type=int, default=224, help="pixels for (b)")
    parser.add_argument("--parts", default="".join(PARTS), help="which parts to run, e.g. bc")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are shown")
    parser.add_argument("--pictures", type=int, default=267, help="pictures for (b)")
    parser.add_argument(
        "--big-pictures", type=int, help="12-megapixel pictures for (b) (default: all of them)"
    )
    parser.add_argument(
        "--large-images", type=int, default=64, help="pictures for (a), 2 s each or more"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows for (c)")
    parser.add_argument("--files", type=int, default=10_000, help="files for (d)")
    parser.add_argument("--stub-files", type=int, default=5_000, help="files for (e)")
    parser.add_argument("--folder", type=Path, help="where to put files (default: the system's)")
    arguments = parser.parse_args()
    if (
        len(arguments.parts) > 1
    ):  # each in a process of its own: memory that one keeps helps the next
        for name in arguments.parts:
            command = [sys.executable, __file__, *sys.argv[1:], "--parts", name]
            subprocess.run(command, check=True)
        return
    print(machine())
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.parts:
            PARTS[name](arguments, Path(folder))


if __name__ == "__main__":
    main()
