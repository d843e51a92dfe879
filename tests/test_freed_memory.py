"""Freed memory is kept for the next pass, so that the system need not find it page by page again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from test_embed import Phase, draw

from mirip_fast.features import engine

#: Ten passes that need 12 MiB in four blocks; how many pages the system had to give for the last five.
PASSES = """
import resource, threading
import numpy as np
from mirip_fast.runtime import keep_freed_memory
{call}
def passes(n):
    for _ in range(n):
        blocks = [np.ones(3 << 20, np.uint8) for _ in range(4)]
        del blocks
def count():
    passes(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    passes(5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=count)  # lanes are threads, with heaps of their own
thread.start()
thread.join()
count()
"""
glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="another C library",
)


def faults(call: str, **environment: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PASSES.format(call=call)],
        env={**clean, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(line) for line in done.stdout.split()]


@glibc
def test_passes_find_their_memory_again() -> None:
    page_count = 5 * (12 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert max(faults("keep_freed_memory()")) < page_count / 20
    # Otherwise this would hold without it.
    assert max(faults("")) > page_count / 4


@glibc
def test_the_users_own_settings_stay() -> None:
    page_count = 5 * (12 << 20) // os.sysconf("SC_PAGE_SIZE")
    for own in (
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ):
        assert max(faults("keep_freed_memory()", **own)) > page_count / 2


def test_embed_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: asked.append(1))
    phase = Phase(tmp_path)
    phase.run([draw(tmp_path / "a.png", 1)])
    assert asked
    asked.clear()
    phase.run([tmp_path / "a.png"])  # nothing to compute
    assert not asked
