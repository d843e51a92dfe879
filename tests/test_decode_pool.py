"""Decoding in processes that may crash, hang or eat memory."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import hostile_images
import numpy as np
import pytest
from hostile_images import encode, tiles
from PIL import Image

from mirip_fast.data import decode_pool
from mirip_fast.data.decode_pool import Decoded, DecodeJob, DecodePool
from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import load_rgb, resize_square, to_array
from mirip_fast.errors import ConfigError, MiripError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name != "posix", reason="decoding processes need POSIX"),
]

BY_NAME = "decode_loaders:by_name"


def jobs(
    paths: Iterable[Path], sizes: tuple[int, ...] = (24,), draft: bool = False
) -> Iterator[DecodeJob]:
    return (DecodeJob(index, path, sizes, "squash", draft) for index, path in enumerate(paths))


def pictures(folder: Path, *names: str) -> list[Path]:
    """The same small picture under several names."""
    for name in names:
        (folder / name).write_bytes(encode(tiles(), "PNG"))
    return [folder / name for name in names]


def same(one: Decoded, two: Decoded) -> bool:
    facts = [(x.index, x.sha256, x.width, x.height, x.reason, len(x.images)) for x in (one, two)]
    return facts[0] == facts[1] and all(map(np.array_equal, one.images, two.images))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"{left} still run"
        time.sleep(0.02)


def children() -> set[int]:
    """The running decoding processes of this process."""
    tasks = Path("/proc/self/task").iterdir()
    found = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    return {pid for pid in found if alive(pid)}


# ------------------------------------------------------------------ results


@pytest.mark.parametrize("draft", [True, False])
def test_the_hostile_collection_is_the_same_in_and_out_of_process(
    tmp_path: Path, draft: bool
) -> None:
    cases = {str(tmp_path / case.name): case for case in hostile_images.make(tmp_path)}
    paths = scan_images(tmp_path)
    results = []
    for workers in (0, 2):
        with DecodePool(workers) as pool:
            results.append(list(pool.decode(jobs(paths, (24, 12), draft))))
    for index, (path, here, there) in enumerate(zip(paths, *results, strict=True)):
        case = cases[str(path)]
        assert same(here, there), case.name
        assert here.index == index
        assert (here.reason is None) == (case.outcome == "picture"), case.name
        if here.reason is None:
            assert here.sha256 == hashlib.sha256(path.read_bytes()).digest()
            image = load_rgb(path)
            assert (here.width, here.height) == image.size
            if not draft:
                for size, got in zip((24, 12), here.images, strict=True):
                    assert np.array_equal(got, to_array(resize_square(image, size, "squash"))), (
                        case.name
                    )
        else:
            assert here.images == () and (here.width, here.height) == (0, 0)


def test_arrays_are_plain_and_may_be_kept(tmp_path: Path) -> None:
    with DecodePool(1) as pool:
        (got,) = pool.decode(jobs(pictures(tmp_path, "a.png")))
    array = got.images[0]
    assert array.shape == (24, 24, 3) and array.dtype == np.uint8
    assert array.flags.c_contiguous and array.flags.writeable
    array += 1  # the pool is closed, the pixels are still there


def test_only_a_window_is_in_flight(tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, "a.png")
    taken = 0

    def endless() -> Iterator[DecodeJob]:
        nonlocal taken
        while True:
            yield DecodeJob(taken, path, (8,), "squash", False)
            taken += 1

    with DecodePool(2, window=5) as pool:
        results = pool.decode(endless())
        assert [next(results).index for _ in range(50)] == list(range(50))
        time.sleep(0.1)
        assert taken < 50 + 5
        results.close()


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Results that the consumer has dropped are not kept anywhere."""
    (path,) = pictures(tmp_path, "a.png")
    with DecodePool(2, window=8) as pool:
        for result in pool.decode(jobs([path] * 300, (64,))):
            del result
        gc.collect()
        assert sum(isinstance(thing, Decoded) for thing in gc.get_objects()) <= 1


def test_two_readers_share_a_pool(tmp_path: Path) -> None:
    paths = pictures(tmp_path, *(f"{i}.png" for i in range(10)))
    with DecodePool(2, window=3) as pool:
        pairs = zip(pool.decode(jobs(paths)), pool.decode(jobs(paths)), strict=True)
        assert all(same(one, two) for one, two in pairs)


def test_an_abandoned_reader_leaves_the_pool_usable(tmp_path: Path) -> None:
    paths = pictures(tmp_path, *(f"slow-{i}.png" for i in range(30)))
    with DecodePool(1, loader=BY_NAME, window=30) as pool:
        reader = pool.decode(jobs(paths))
        next(reader)
        reader.close()
        started = time.monotonic()
        assert next(pool.decode(jobs(paths[:1]))).reason is None
        assert time.monotonic() - started < 3, "it did the work that nobody wants any more"


def test_an_error_among_the_jobs_reaches_the_reader(tmp_path: Path) -> None:
    def broken() -> Iterator[DecodeJob]:
        yield from jobs(pictures(tmp_path, "a.png"))
        raise KeyError("manifest")

    with DecodePool(1) as pool, pytest.raises(KeyError, match="manifest"):
        list(pool.decode(broken()))


# ------------------------------------------------------------------ crashes, hangs, memory


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("exit", r"crashed \(exit status 3\)"),
        ("segfault", r"crashed \(SIGSEGV\)"),
        ("bus", r"crashed \(SIGBUS\)"),
        ("hang", "hung: no result after [12] seconds"),
    ],
)
def test_a_lost_process_costs_one_image(tmp_path: Path, word: str, reason: str) -> None:
    names = [f"{word if i in (2, 4, 5) else 'any'}-{i}.png" for i in range(8)]
    paths = pictures(tmp_path, *names)
    before = children()
    with DecodePool(2, timeout_s=1.0, loader=BY_NAME) as pool:
        results = list(pool.decode(jobs(paths)))
        assert len(children() - before) <= 2
    assert [r.index for r in results] == list(range(len(names)))
    for name, result in zip(names, results, strict=True):
        if name.startswith(word):
            assert result.reason is not None
            assert re.search(reason, result.reason)
            assert result.images == () and result.sha256 == b""
        else:
            assert result.reason is None and result.width == hostile_images.WIDTH


def test_the_time_limit_is_for_one_image_not_for_those_that_wait(tmp_path: Path) -> None:
    paths = pictures(tmp_path, *(f"nap-{i}.png" for i in range(4)))  # 0.6 s each
    with DecodePool(1, timeout_s=1.1, loader=BY_NAME) as pool:
        next(pool.decode(jobs(paths[:1])))
        time.sleep(1.2)  # nor does idle time count
        assert [r.reason for r in pool.decode(jobs(paths))] == [None] * 4


def test_a_picture_that_needs_too_much_memory_fails_alone(tmp_path: Path) -> None:
    Image.new("L", (9000, 9000)).save(tmp_path / "0.png")  # 81 million pixels
    paths = [tmp_path / "0.png", *pictures(tmp_path, "1.png")]
    with DecodePool(1, memory_limit_bytes=400 << 20) as pool:
        big, other = pool.decode(jobs(paths))
    assert big.reason == "it needs more memory than one image may take"
    assert big.sha256 == hashlib.sha256(paths[0].read_bytes()).digest()
    assert other.reason is None


def test_a_very_long_picture_needs_little_memory(tmp_path: Path) -> None:
    # Done in the plain way, the wide one would take 0.4 GB of weights, and with an older Pillow the
    # tall one an intermediate of 1.7 GB.
    Image.new("RGB", (1, 2_000_000), (9, 99, 199)).save(tmp_path / "tall.png")
    Image.new("RGB", (12_000_000, 1), (9, 99, 199)).save(tmp_path / "wide.png")
    Image.new("RGB", (1, 1), (9, 99, 199)).save(tmp_path / "dot.png")
    with DecodePool(1, memory_limit_bytes=400 << 20) as pool:
        for mode in ("squash", "pad", "crop"):
            names = ("tall.png", "wide.png", "dot.png")
            for result in pool.decode(
                DecodeJob(0, tmp_path / name, (224,), mode, True) for name in names
            ):
                assert result.reason is None
                assert np.abs(result.images[0][111, 111].astype(int) - [9, 99, 199]).max() <= 2


def test_a_process_that_dies_idle_costs_nothing(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "pid-0.png", "1.png", "2.png")
    with DecodePool(1, loader=BY_NAME) as pool:
        (first,) = pool.decode(jobs(paths[:1]))
        assert first.reason is not None
        os.kill(int(first.reason), signal.SIGKILL)
        wait_until_gone([int(first.reason)])
        assert [r.reason for r in pool.decode(jobs(paths[1:]))] == [None, None]


def test_an_answer_for_another_image_is_never_taken(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "0.png", "1.png")
    with DecodePool(1, loader="decode_loaders:answers_wrongly") as pool:
        results = list(pool.decode(jobs(paths)))
    assert [r.index for r in results] == [0, 1]
    assert all(r.reason is not None and "answered for image" in r.reason for r in results)


# ------------------------------------------------------------------ life and death of the processes


def test_processes_are_light_and_leave_the_main_module_alone(tmp_path: Path) -> None:
    with DecodePool(1, loader="decode_loaders:surroundings") as pool:
        (told,) = pool.decode(jobs([tmp_path]))
    assert told.reason == "[] None"


def test_an_interrupt_or_end_signal_to_the_processes_is_ignored(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "pid-0.png", "slow-1.png", "slow-2.png", "pid-3.png")
    with DecodePool(1, loader=BY_NAME) as pool:
        reader = pool.decode(jobs(paths))
        first = next(reader)
        assert first.reason is not None
        pid = int(first.reason)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        rest = list(reader)
        assert os.getsid(pid) != os.getsid(0)  # the terminal's Ctrl-C does not even reach it
    assert [r.reason for r in rest[:2]] == [None, None]
    assert rest[2].reason == str(pid), "it was replaced"


def test_close_ends_all_at_once_even_a_hanging_one(tmp_path: Path) -> None:
    paths = pictures(tmp_path, "pid-0.png", *(f"hang-{i}.png" for i in range(1, 9)))
    before = children()
    files = set(Path("/proc/self/fd").iterdir()), set(Path("/dev/shm").iterdir())
    pool = DecodePool(2, loader=BY_NAME)
    reader = pool.decode(jobs(paths))
    next(reader)
    processes = children() - before
    assert len(processes) == 2
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 3
    wait_until_gone(processes)
    with pytest.raises(MiripError, match="closed"):
        next(reader)
    with pytest.raises(MiripError, match="closed"):
        list(pool.decode(jobs(paths)))
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mirip-decode"]
    assert files == (set(Path("/proc/self/fd").iterdir()), set(Path("/dev/shm").iterdir()))


_HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
pool = DecodePool(2, loader="decode_loaders:by_name")
folder = Path(sys.argv[1])
reader = pool.decode(DecodeJob(0, folder / name, (8,), "squash", False)
    for name in ("pid-a.png", "pid-b.png", "hang-a.png", "hang-b.png"))
print(next(reader).reason, next(reader).reason, flush=True)
{last}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a hanging orphan")
@pytest.mark.parametrize("last", ["time.sleep(60)", ""])
def test_processes_end_with_their_parent(tmp_path: Path, last: str) -> None:
    pictures(tmp_path, "pid-a.png", "pid-b.png", "hang-a.png", "hang-b.png")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER.format(last=last), tmp_path, Path(__file__).parent],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(decode_pool.__file__).parents[2])},
    )
    assert holder.stdout is not None
    pids = {int(word) for word in holder.stdout.readline().split()}
    assert pids
    if last:
        holder.kill()  # kill -9: nothing of the parent's own can tidy up
    holder.communicate(timeout=10)
    wait_until_gone(pids)


def test_ctrl_c_reaches_a_waiting_reader(tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, "hang-0.png")
    before = children()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), DecodePool(1, loader=BY_NAME) as pool:
        timer.start()
        list(pool.decode(jobs([path])))
    assert time.monotonic() - started < 5
    wait_until_gone(children() - before)


@pytest.mark.parametrize("loader", ["no_such_module:decode", "decode_loaders:no_such_function"])
def test_a_process_that_does_not_start_is_told_with_its_last_words(
    tmp_path: Path, loader: str
) -> None:
    with (
        DecodePool(1, loader=loader) as pool,
        pytest.raises(MiripError, match=r"no_such.*--workers 0"),
    ):
        list(pool.decode(jobs(pictures(tmp_path, "a.png"))))


def test_a_missing_interpreter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool.sys, "executable", str(tmp_path / "python"))
    with (
        DecodePool(1) as pool,
        pytest.raises(MiripError, match=r"cannot be started: .*No such file"),
    ):
        list(pool.decode(jobs(pictures(tmp_path, "a.png"))))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="--workers must be 0 or more, not -1"):
        DecodePool(-1)
    with pytest.raises(ConfigError, match="window must be at least 1"):
        DecodePool(0, window=0)
    with pytest.raises(ConfigError, match="'stretch'"):
        DecodeJob(0, Path("a"), (8,), "stretch", False)
    for sizes in ((), (8, 0)):
        with pytest.raises(ConfigError, match="at least 1 pixel"):
            DecodeJob(0, Path("a"), sizes, "pad", False)


def test_waiting_for_an_answer_is_no_hang(tmp_path: Path) -> None:
    Image.new("RGB", (1500, 1500), "red").save(tmp_path / "a.png")

    def slow(_: bytes) -> tuple[int, ...]:
        time.sleep(1.5)  # a large cache is looked through
        return (24,)

    job = DecodeJob(0, tmp_path / "a.png", (24,), "squash", False, ask=True)
    with DecodePool(1, timeout_s=1.0) as pool:
        assert [d.reason for d in pool.decode([job], slow)] == [None]
