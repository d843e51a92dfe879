"""The lock of a feature store: one run writes at a time; the processes of one distributed run share it.

The lock lives in the system, not in the file, so that it is free the moment its holder dies. What is
written in the file tells others who holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from mirip_fast.errors import StoreError, StoreLockedError
from mirip_fast.features.stages import StoppedError
from mirip_fast.files import disk_full, is_disk_full, open_regular, read_json

LOCK_FILE = "LOCK"
#: How long to look again where the file names a holder that is gone: the real one is about to sign.
_SIGNING_SECONDS = 2.0
_PAUSE = 0.005
_MOST_BYTES = 64 << 10  # of what is read of the file
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class StoreLock:
    """The lock, held from the construction to :meth:`release`.

    A run alone holds it exclusively. With a ``run_id``, the first process of the run to come holds it
    exclusively until :meth:`share`; the others wait for that, and then hold it together. Each rank
    holds a lock of its own, too: two processes that call themselves the same rank can not both write.

    Attributes:
        exclusive: nobody else holds it.

    Args:
        folder: the store's.
        command: what is running.
        run_id: names a distributed run; None for a run alone.
        rank: number of this process in it.
        stop: once set, from any thread, waiting for the first process ends.

    Raises:
        StoppedError: ``stop`` was set.
        StoreLockedError: another run has it, or another process is this rank; names it.
        StoreError: the folder can not be written to.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        run_id: str | None,
        rank: int,
        stop: threading.Event | None = None,
    ):
        self._folder, self._run_id = folder, run_id
        self._stop = stop or threading.Event()
        self._holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
            "run_id": run_id,
        }
        self._rank_handle: int | None = None
        self._handle = self._open(LOCK_FILE)
        self._locked = False
        self.exclusive = False
        _held.add(self)
        try:
            if run_id is not None:
                self._take_rank(rank)
            self._take()
        except BaseException:
            self.release()
            raise

    def share(self) -> None:
        """Let the other processes of the run in; a run without a ``run_id`` keeps it for itself."""
        if self._run_id is None or not self.exclusive:
            return
        self.exclusive = False
        # Changing a lock is giving it back and taking another: a stranger may come between.
        if not self._join():
            self._locked = False
            raise self._refusal(_read_holder(self._folder))

    def release(self) -> None:
        """Give the lock back."""
        if self._locked and (self.exclusive or _try_lock(self._handle, shared=False)):
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)  # nobody else holds it: no name is left behind
        self._close()

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return self._locked

    def _close(self) -> None:
        _held.discard(self)
        self._locked = self.exclusive = False
        handles = [h for h in (self._handle, self._rank_handle) if h is not None and h >= 0]
        self._handle, self._rank_handle = -1, None
        for handle in handles:
            os.close(handle)

    def _open(self, name: str) -> int:
        """Open a lock's file; links are not followed, since what the file holds is replaced."""
        file = self._folder / name
        try:
            handle = open_regular(file, os.O_RDWR | os.O_CREAT | _NO_LINK)
            if os.fstat(handle).st_nlink > 1 and not _is_ours(os.read(handle, _MOST_BYTES)):
                os.close(handle)
                raise ValueError("it is another name of a file that is no lock")
            return handle
        except ValueError as error:
            raise StoreError(
                f"{file} is no lock of mirip-fast ({error}). Remove it, and it is made anew."
            ) from error
        except OSError as error:
            if file.is_symlink():
                raise StoreError(
                    f"{file} is a link, and a lock is never one. Remove it, and it is made anew."
                ) from error
            if is_disk_full(error):
                raise disk_full(self._folder / name) from error
            raise StoreError(
                f"{self._folder} can not be written to ({error.strerror}). The features in it can be "
                "read; to compute more, make it writable or give another --cache-dir."
            ) from error

    def _take_rank(self, rank: int) -> None:
        self._rank_handle = self._open(f"{LOCK_FILE}-r{rank:02d}")
        if not _try_lock(self._rank_handle, shared=False):
            raise StoreLockedError(
                f"{self._folder} is being written to by another process of rank {rank}. Nothing was "
                "changed; start every process of a run with a RANK of its own."
            )

    def _take(self) -> None:
        until = time.monotonic() + _SIGNING_SECONDS
        while not _try_lock(self._handle, shared=False):
            holder = _read_holder(self._folder)
            if self._is_our_run(holder):
                if self._join():
                    return
                # Else its first process is still looking after what a crash left behind.
            elif (self._run_id is None and _seems_alive(holder)) or time.monotonic() > until:
                raise self._refusal(holder)
            if self._stop.wait(_PAUSE):
                raise StoppedError
        if self._was_deleted():  # whole stores are pruned with their lock
            os.close(self._handle)
            self._handle = self._open(LOCK_FILE)
            return self._take()
        self._locked = self.exclusive = True
        try:
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, json.dumps(self._holder).encode())
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self._folder / LOCK_FILE) from error
            raise

    def _was_deleted(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._handle), (self._folder / LOCK_FILE).stat())
        except FileNotFoundError:
            return True

    def _join(self) -> bool:
        """Hold the lock together with the others of our run, if it is theirs."""
        if not _try_lock(self._handle, shared=True):
            return False
        self._locked = self._is_our_run(_read_holder(self._folder))
        if not self._locked:
            _unlock(self._handle)
        return self._locked

    def _is_our_run(self, holder: dict[str, Any]) -> bool:
        return self._run_id is not None and holder.get("run_id") == self._run_id

    def _refusal(self, holder: dict[str, Any]) -> StoreLockedError:
        return StoreLockedError(
            f"{self._folder} is being written to by {_named(holder)}. Nothing was changed; wait for it, "
            "or stop it (what it committed stays) and run the same command again."
        )


def holder_of(folder: Path) -> str | None:
    """Who writes to a store at this moment, for people; None where nobody does."""
    file = folder / LOCK_FILE
    try:
        handle = open_regular(file)
    except (OSError, ValueError):
        return None
    try:
        if _try_lock(handle, shared=False):
            return None
    except StoreError:
        return None  # without locks nobody writes
    finally:
        os.close(handle)
    return _named(_read_holder(folder))


def _read_holder(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / LOCK_FILE, _MOST_BYTES)
    except (OSError, ValueError):
        return {}


def _is_ours(content: bytes) -> bool:
    """Whether a lock's file holds what is written into one: nothing, or who holds it."""
    try:
        return not content or "pid" in json.loads(content)
    except (ValueError, RecursionError, TypeError):
        return False


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    what = f" ({holder['command']})" if holder.get("command") else ""
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}{what}"


def _seems_alive(holder: dict[str, Any]) -> bool:
    """Whether the signed holder may be the real one: it lives, or is on another machine."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError):
        return True
    return True


def _try_lock(handle: int, *, shared: bool) -> bool:
    """Take or change the lock of an open file; False where somebody else stands against it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return not shared and _try_lock_windows(handle)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a network file system without a lock service
        raise StoreError(
            f"the file system of the cache can not lock files ({error.strerror}): two runs that write "
            "at once would not see each other. Mount it with locks, or give --cache-dir on a disk of "
            "this machine and join it later with `mirip-fast cache merge`."
        ) from error
    return True


def _unlock(handle: int) -> None:
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_UN)


def _try_lock_windows(handle: int) -> bool:
    import msvcrt

    os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the text, which others must be able to read
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True


#: Locks of this process. A forked child (a decode worker) must not keep them when this process dies.
_held: weakref.WeakSet[StoreLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
