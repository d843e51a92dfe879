"""Copying finished checkpoints elsewhere while training goes on."""

from __future__ import annotations

import logging
import queue
import threading
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

    A remote that fails or can not be reached never stops a run: it is told, and the file is tried again when
    it changes next.

    Args:
        url: a folder or URL, such as ``s3://bucket/runs``; files go into a folder of the run's name.
        name: of the run.
        pause_s: seconds between two tries.

    Raises:
        ConfigError: see :func:`check_remote`.
    """

    def __init__(self, url: str, name: str, *, pause_s: float = 5.0):
        check_remote(url)
        self.url, self._name, self._pause_s = url, name, pause_s
        self.failed: set[str] = set()  # names of files whose last copy failed
        self._wanted: queue.Queue[Path | None] = queue.Queue()
        self._waiting: set[Path] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirip-remote", daemon=True)
        self._thread.start()

    def add(self, path: Any) -> None:
        """Copy this file soon; one that is still waiting is copied once, as it is then."""
        with self._lock:
            if path in self._waiting:
                return
            self._waiting.add(path)
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
        while (path := self._wanted.get()) is not None:
            with self._lock:
                self._waiting.discard(path)
            self._copy(path)

    def _copy(self, path: Path) -> None:
        """Copy under another name, then rename: nobody sees half a checkpoint."""
        from fsspec.core import url_to_fs

        for attempt in range(1, _TRIES + 1):
            try:
                fs, root = url_to_fs(self.url)  # some log in here; the next time it is kept
                folder = f"{str(root).rstrip('/')}/{self._name}"
                fs.makedirs(folder, exist_ok=True)
                fs.put_file(str(path), f"{folder}/{path.name}.partial")
                fs.mv(f"{folder}/{path.name}.partial", f"{folder}/{path.name}")
            except Exception as error:  # whatever it is, it must not cost the run
                if not path.exists():
                    return  # pruned meanwhile
                if attempt == _TRIES:
                    self.failed.add(path.name)
                    why = one_line(str(error)) or type(error).__name__
                    log.warning("%s could not be copied to %s: %s", path.name, self.url, why)
                else:
                    self._closing.wait(self._pause_s)
            else:
                self.failed.discard(path.name)
                return
