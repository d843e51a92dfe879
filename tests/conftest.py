"""What every test starts from: the same random numbers, one thread, and no network."""

from __future__ import annotations

import os

# Threads that wait for each other only cost time here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from mirip_fast.runtime import set_seed


@pytest.fixture(autouse=True)
def _seed() -> None:
    set_seed(0)
