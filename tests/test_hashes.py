"""The memory of file hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirip_fast.data import hashes
from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import ImageError


def old_file(path: Path, content: bytes, age_s: float = 3600) -> Path:
    """A file that was changed a while ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    then = time.time_ns() - int(age_s * 1e9)
    os.utime(path, ns=(then, then))
    return path


def sha(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read, as the test goes on."""
    seen: list[Path] = []
    real = hashes.open_image_file

    def open_image_file(path: Path, *, max_bytes: int | None) -> object:
        seen.append(path)
        return real(path, max_bytes=max_bytes)

    monkeypatch.setattr(hashes, "open_image_file", open_image_file)
    return seen


@pytest.fixture
def everyones_folder() -> Iterator[Path]:
    """A folder that a user without rights can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# ------------------------------------------------------------------ remembering


def test_an_unchanged_file_is_read_once(tmp_path: Path, read: list[Path]) -> None:
    file = old_file(tmp_path / "a.png", b"one")
    for _ in range(3):
        with HashMemory(tmp_path / "hashes.sqlite") as memory:
            assert memory.sha256(file) == sha(b"one")
            assert list(memory.sha256_many([file, file])) == [sha(b"one")] * 2
    assert read == [file]


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    file = old_file(tmp_path / "a.png", b"one")
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        memory.sha256(file)
        if change == "size":
            status = file.stat()
            file.write_bytes(b"three")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:
            old_file(file, b"two", age_s=3000)
        assert memory.sha256(file) == sha(file.read_bytes())
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        assert next(memory.sha256_many([file])) == sha(file.read_bytes())


def test_rehash_ignores_what_is_remembered_and_corrects_it(tmp_path: Path) -> None:
    file = old_file(tmp_path / "a.png", b"one")
    memory = HashMemory(tmp_path / "hashes.sqlite")
    memory.sha256(file)
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # a change that leaves no trace
    assert memory.sha256(file) == sha(b"one")
    assert list(memory.sha256_many([file], rehash=True)) == [sha(b"two")]
    assert memory.sha256(file) == sha(b"two")
    file.write_bytes(b"six")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert memory.sha256(file) == sha(b"two")
    assert memory.sha256(file, rehash=True) == sha(b"six")
    memory.close()


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    file = old_file(tmp_path / "a.png", b"one", age_s=0.5)
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        assert memory.sha256(file) == sha(b"one")
        status = file.stat()
        file.write_bytes(b"two")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # a clock too coarse to tell
        assert memory.sha256(file) == sha(b"two")


def test_names_that_are_not_utf8_and_relative_names(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        old_file(tmp_path / os.fsdecode(name), name)
        for name in (b"caf\xe9\xff.png", "가.png".encode(), b"line\nbreak'\".png")
    ]
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        assert list(memory.sha256_many(files)) == [sha(os.fsencode(file.name)) for file in files]
    monkeypatch.chdir(tmp_path)
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        list(memory.sha256_many([Path(file.name) for file in files]))
    assert len(read) == len(files)


# ------------------------------------------------------------------ many files


def test_many_files_in_order_with_errors_as_values(tmp_path: Path) -> None:
    paths, expected = [], []
    for number in range(1300):
        content = f"file {number}".encode()
        path = tmp_path / f"{number % 7}" / f"{number}.png"
        if number % 10 == 3:
            expected.append(None)
        else:
            old_file(path, content)
            expected.append(sha(content))
        paths.append(path)
    for _ in range(2):
        with HashMemory(tmp_path / "hashes.sqlite") as memory:
            got = list(memory.sha256_many(iter(paths), threads=3))
        assert [item if isinstance(item, bytes) else None for item in got] == expected
        assert {str(item) for item in got if not isinstance(item, bytes)} == {
            "the file does not exist"
        }


def test_many_files_are_taken_lazily_and_can_be_left(tmp_path: Path) -> None:
    file = old_file(tmp_path / "a.png", b"one")
    taken = 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield file

    with HashMemory(None) as memory:
        results = memory.sha256_many(paths())
        assert [next(results) for _ in range(3)] == [sha(b"one")] * 3
        results.close()
    assert taken <= 3 * 500


def test_images_have_a_size_limit_and_single_files_have_none(tmp_path: Path) -> None:
    hole = tmp_path / "a.jpg"
    hole.touch()
    os.truncate(hole, (2 << 30) + 1)
    with HashMemory(None) as memory:
        (error,) = memory.sha256_many([hole])
        assert isinstance(error, ImageError) and "over the limit" in str(error)
        assert memory.sha256(old_file(tmp_path / "weights", b"any")) == sha(b"any")


def test_single_file_errors_are_raised(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with HashMemory(None) as memory:
        with pytest.raises(ImageError, match="does not exist"):
            memory.sha256(tmp_path / "none.png")
        with pytest.raises(ImageError, match="named pipe"):
            memory.sha256(tmp_path / "pipe.png")


# ------------------------------------------------------------------ when the file fails


_ROW = "(path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB) WITHOUT ROWID"


@pytest.mark.parametrize(
    "script",
    [
        "CREATE VIEW sha256_v1 AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT x'00' path, i size, i mtime_ns, x'00' sha256 FROM n",
        f"CREATE TABLE sha256_v1 {_ROW}; CREATE TRIGGER t BEFORE INSERT ON sha256_v1 BEGIN "
        "SELECT count(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i FROM n); END",
        "CREATE TABLE sha256_v1 (path, size, mtime_ns, sha256)",
        f"CREATE TABLE other {_ROW}",
        None,
    ],
)
def test_a_file_that_holds_something_else_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str | None
) -> None:
    file, store = old_file(tmp_path / "a.png", b"one"), tmp_path / "hashes.sqlite"
    if script is None:
        store.write_bytes(b"this is no database" * 100)
    else:
        made = sqlite3.connect(store)
        made.executescript(script)
        made.close()
    with HashMemory(store) as memory:
        assert memory.sha256(file) == sha(b"one")
    assert (tmp_path / "hashes.sqlite.damaged").exists() and "damaged" in caplog.text
    assert sqlite3.connect(store).execute("SELECT count(*) FROM sha256_v1").fetchone() == (1,)


@pytest.mark.parametrize("value", ["'a text'", "x'00'", "NULL", "7"])
def test_a_hash_that_is_none_is_no_hash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    file, store = old_file(tmp_path / "a.png", b"one"), tmp_path / "hashes.sqlite"
    with HashMemory(store) as memory:
        memory.sha256(file)
    with sqlite3.connect(store) as database:
        database.execute(f"UPDATE sha256_v1 SET sha256 = {value}")
    database.close()
    with HashMemory(store) as memory:
        assert memory.sha256(file) == sha(b"one")
    assert "damaged" in caplog.text


@pytest.mark.parametrize("name", ["hashes.sqlite", "hashes.sqlite-journal", "hashes.sqlite-wal"])
def test_a_pipe_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = old_file(tmp_path / "a.png", b"one")
    os.mkfifo(tmp_path / name)
    with HashMemory(tmp_path / "hashes.sqlite") as memory:
        assert memory.sha256(file) == sha(b"one")
    assert f"{name} is no regular file" in caplog.text


def test_damage_that_shows_later_is_put_aside_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "hashes.sqlite"
    files = [old_file(tmp_path / f"{i}.png", b"%d" % i) for i in range(600)]
    with HashMemory(store) as memory:
        list(memory.sha256_many(files))
    content = bytearray(store.read_bytes())
    content[4096 + 8 :] = b"\xaa" * (len(content) - 4096 - 8)  # the schema's page stays whole
    store.write_bytes(content)
    with HashMemory(store) as memory:
        assert list(memory.sha256_many(files)) == [sha(b"%d" % i) for i in range(600)]
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    with HashMemory(store) as memory:
        assert memory.sha256(files[5]) == sha(b"5")
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_folder_costs_the_memory_alone(
    everyones_folder: Path, exists: bool, caplog: pytest.LogCaptureFixture, read: list[Path]
) -> None:
    store, first, second = (everyones_folder / name for name in ("h.sqlite", "1.png", "2.png"))
    for file in (first, second):
        old_file(file, file.name.encode())
    if exists:
        with HashMemory(store) as memory:
            memory.sha256(first)
    everyones_folder.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)  # the superuser may write everywhere
    try:
        with HashMemory(store) as memory:
            for _ in range(2):
                assert list(memory.sha256_many([first, second])) == [sha(b"1.png"), sha(b"2.png")]
    finally:
        os.seteuid(was)
        everyones_folder.chmod(0o755)
    assert read == [first, second]  # the old hash was used, the new one remembered for this run
    assert len(caplog.records) == 1 and "not remembered between runs" in caplog.text


def test_a_busy_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hashes, "_BUSY_SECONDS", 0.05)
    store = tmp_path / "hashes.sqlite"
    HashMemory(store).close()
    other = sqlite3.connect(store, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with HashMemory(store) as memory:
        assert memory.sha256(old_file(tmp_path / "a.png", b"one")) == sha(b"one")
    assert len(caplog.records) == 1 and "locked" in caplog.text
    other.close()


# ------------------------------------------------------------------ several processes

_FILL = """
import os, sys
from pathlib import Path
from mirip_fast.data import hashes
hashes._ROWS_PER_COMMIT = 20
with hashes.HashMemory(Path(sys.argv[1])) as memory:
    print("ready", flush=True)
    for turn in range(10**9 if sys.argv[2] == "for ever" else 1):
        for digest in memory.sha256_many(sorted(Path(sys.argv[3]).iterdir()), rehash=True):
            assert len(digest) == 32
"""


def _filler(store: Path, how: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _FILL, str(store), how, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(hashes.__file__).parents[2])},
    )


def test_kill_and_two_processes_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, store = tmp_path / "images", tmp_path / "hashes.sqlite"
    files = [old_file(folder / f"{i:03}.png", b"%d" % i) for i in range(200)]
    for pause in (0.0, 0.03, 0.07):
        process = _filler(store, "for ever", folder)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert sqlite3.connect(store).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    together = [_filler(store, "once", folder) for _ in range(2)]
    for process in together:
        _, remarks = process.communicate(timeout=60)
        assert process.returncode == 0 and remarks == ""
    with HashMemory(store) as memory:
        assert list(memory.sha256_many(files)) == [sha(b"%d" % i) for i in range(200)]
    assert sqlite3.connect(store).execute("SELECT count(*) FROM sha256_v1").fetchone() == (200,)
    assert not caplog.records


def test_hashes_are_committed_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_ROWS_PER_COMMIT", 10)
    files = [old_file(tmp_path / f"{i}.png", b"%d" % i) for i in range(25)]
    memory = HashMemory(tmp_path / "hashes.sqlite")
    list(memory.sha256_many(files))
    rows = sqlite3.connect(tmp_path / "hashes.sqlite").execute("SELECT count(*) FROM sha256_v1")
    assert rows.fetchone() == (20,)
    memory.close()
