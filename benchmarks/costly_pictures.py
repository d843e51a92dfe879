"""What single pictures cost to decode: `python benchmarks/costly_pictures.py FOLDER`.

Each picture is decoded in a process of its own, under the limits of a decoding process. Shown are the dearest
ones: seconds on the clock, processor seconds, and by how much the process's memory grew at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import Line, machine, show

from mirip_fast.data.image_files import scan_images

_ONE = """
import json, re, resource, sys, time
from pathlib import Path
from mirip_fast.data.decode_pool import MEMORY_LIMIT_BYTES
from mirip_fast.data.decode_worker import DecodeJob, _limit_memory, _quieten, decode_job

def peak():  # MiB; getrusage would give that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

_quieten()
_limit_memory(MEMORY_LIMIT_BYTES)
path, size = sys.argv[1:]
before, started, cpu = peak(), time.perf_counter(), time.process_time()
done = decode_job(DecodeJob(0, Path(path), (int(size),), "squash", True), lambda _: ())
costs = time.perf_counter() - started, time.process_time() - cpu, peak() - before
print(json.dumps([*costs, done.reason or ""]))
"""


def cost(path: Path, size: int) -> tuple[float, float, float, str]:
    """Seconds, processor seconds, MiB, and why it failed (empty if it did not)."""
    command = [sys.executable, "-c", _ONE, os.fsdecode(path), str(size)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr[-200:]
        reason = f"crashed: {how}"
        return time.perf_counter() - started, float("nan"), float("nan"), reason
    seconds, cpu, grown, reason = json.loads(done.stdout)
    return seconds, cpu, grown, reason


def main() -> None:
    """Decode every picture of a folder and show the dearest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--worst", type=int, default=5, help="how many to show")
    arguments = parser.parse_args()
    print(machine())
    costs = {path: cost(path, arguments.size) for path in scan_images(arguments.folder)}
    for what, unit, index, most in (("time", "s", 0, 2.0), ("memory", "MiB", 2, 500 / 1.048576)):
        worst = sorted(costs, key=lambda path: costs[path][index], reverse=True)[: arguments.worst]
        lines = [
            Line(f"{path.name!a} {costs[path][3][:40]}", costs[path][index], unit, most=most)
            for path in worst
        ]
        show(f"{len(costs)} pictures at {arguments.size} pixels: the dearest in {what}", lines)


if __name__ == "__main__":
    main()
