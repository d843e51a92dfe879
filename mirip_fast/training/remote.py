"""Copying finished checkpoints elsewhere while training goes on."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any

from mirip_fast.errors import ConfigError

log = logging.getLogger(__name__)

_TRIES = 3


class RemoteSync:
    """Copies files to a folder behind an fsspec URL, in a thread of its own.

    A remote that fails never stops a run: it is told, and the file is tried again when it changes next.

    Args:
        url: a folder or URL, such as ``s3://bucket/runs``; files go into a folder of the run's name.
        name: of the run.
        pause_s: seconds between two tries.

    Raises:
        ConfigError: the URL's kind is unknown, or its library is not installed.
    """

    def __init__(self, url: str, name: str, *, pause_s: float = 5.0):
        try:
            from fsspec.core import url_to_fs

            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--remote-sync {url}: {error}") from error
        self.url, self._folder, self._pause_s = url, f"{str(root).rstrip('/')}/{name}", pause_s
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
        target = f"{self._folder}/{path.name}"
        for attempt in range(1, _TRIES + 1):
            try:
                self._fs.makedirs(self._folder, exist_ok=True)
                self._fs.put_file(str(path), f"{target}.partial")
                self._fs.mv(f"{target}.partial", target)
            except Exception as error:  # whatever it is, it must not cost the run
                if not path.exists():
                    return  # pruned meanwhile
                if attempt == _TRIES:
                    self.failed.add(path.name)
                    log.warning("%s could not be copied to %s: %s", path.name, self.url, error)
                else:
                    self._closing.wait(self._pause_s)
            else:
                self.failed.discard(path.name)
                return
