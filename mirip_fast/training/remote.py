"""Copying finished checkpoints, and what resuming from them needs, elsewhere while training goes on."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mirip_fast.data.image_files import one_line
from mirip_fast.data.remote import located
from mirip_fast.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_TRIES = 3


def check_remote(url: str) -> None:
    """Refuse before a run what can never be copied to; the network is not asked.

    Raises:
        ConfigError: the address carries a password or a signature (it would be kept with the run), its kind
            is unknown, or its package is not installed.
    """
    from fsspec.core import get_filesystem_class, split_protocol

    try:
        located(url)
        get_filesystem_class(split_protocol(url)[0] or "file")
    except DataError as error:  # which does not repeat the password
        raise ConfigError(f"--remote-sync: {error}") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--remote-sync {url}: {error}") from error


class RemoteSync:
    """Copies files to a folder behind an fsspec URL, in a thread of its own.

    A remote that fails or cannot be reached never stops a run: it is told, and the file is tried again when
    it changes next.

    Args:
        url: a folder or URL, such as ``s3://bucket/runs``; files go into a folder of the run's name.
        name: of the run.
        along: gives the small files that go along with each file, by their place below the URL; those that
            changed are copied before the file gets its name, so that a checkpoint never lacks its history.
        pause_s: seconds between two tries.

    Raises:
        ConfigError: see :func:`check_remote`.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        along: Callable[[], Mapping[str, Path]] = dict,
        pause_s: float = 5.0,
    ):
        check_remote(url)
        self.url, self._name, self._along, self._pause_s = url, name, along, pause_s
        self._copied: dict[str, tuple[int, int]] = {}  # place → size and time of what was copied
        self.failed: set[str] = set()  # names of files whose last copy failed
        self._wanted: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirip-remote", daemon=True)
        self._thread.start()

    def add(self, path: Path) -> None:
        """Copy this file soon; one that is still waiting is copied once, as it is then."""
        self._wanted.put(path)

    def finish(self, timeout_s: float = 300.0) -> bool:
        """Wait for what is under way; returns whether everything was copied."""
        self._wanted.put(None)
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("%s did not take everything in %d s; it is left so", self.url, timeout_s)
            return False
        if self.failed:
            log.warning("Not copied to %s: %s", self.url, ", ".join(sorted(self.failed)))
        return not self.failed

    def _work(self) -> None:
        wanted: dict[Path | None, None] = {}
        while None not in wanted:
            wanted = {self._wanted.get(): None}
            while not self._wanted.empty():
                wanted[self._wanted.get()] = None
            for path in filter(None, wanted):
                self._copy(path)
        self._copy(None)

    def _copy(self, path: Path | None) -> None:
        """Copy under another name, then rename: nobody sees half a file. None: what goes along alone."""
        from fsspec.core import url_to_fs

        name = "what resuming needs" if path is None else path.name
        for attempt in range(1, _TRIES + 1):
            try:
                fs, root = url_to_fs(self.url)  # some log in here; the next time it is kept
                target = str(root).rstrip("/")
                if path is None:
                    self._copy_along(fs, target)
                else:
                    place = f"{target}/{self._name}/{path.name}"
                    with _put(fs, path, place):
                        self._copy_along(fs, target)
            except Exception as error:  # whatever it is, it must not cost the run
                if path is not None and not path.exists():
                    return  # pruned meanwhile
                if attempt == _TRIES:
                    self.failed.add(name)
                    why = one_line(str(error)) or type(error).__name__
                    log.warning("%s could not be copied to %s: %s", name, self.url, why)
                else:
                    self._closing.wait(self._pause_s)
            else:
                self.failed.discard(name)
                return

    def _copy_along(self, fs: Any, target: str) -> None:
        for place, file in self._along().items():
            with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile
                state = file.stat()
                version = state.st_size, state.st_mtime_ns
                if self._copied.get(place) != version:
                    with _put(fs, file, f"{target}/{place}"):
                        pass
                    self._copied[place] = version


@contextlib.contextmanager
def _put(fs: Any, path: Path, place: str) -> Iterator[None]:
    """Copy a file, which gets its name after the block."""
    fs.makedirs(place.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(path), f"{place}.partial")
    yield
    fs.mv(f"{place}.partial", place)
