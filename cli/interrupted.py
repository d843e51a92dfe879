"""Being stopped by Ctrl-C or SIGTERM: what the signals do, and what to type to go on."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType

import click

STATUS = 130  # the shell's number for a program ended by Ctrl-C

_AT_ONCE_AFTER_SECONDS = 10.0  # as long as a clean-up that goes well may take
_SENT_TOGETHER_SECONDS = 0.5  # signals of a launcher; what comes later was typed


class Interrupted(KeyboardInterrupt):
    """A command was stopped; the message says how to go on."""


class StopSignals:
    """What SIGINT (Ctrl-C) and SIGTERM do: the first stops the command, the next leave it alone for a while.

    The first raises KeyboardInterrupt, and the command commits what is computed and gives locks back. More of
    them must not break that off, and are no rarity: torchrun signals each rank twice. A clean-up may
    hang, though, or never begin where C code hangs. So a second signal, half a second later or more, ends the
    process within 10 seconds with status 130, and one that comes 10 seconds after the first ends it at once:
    the stores bear that, as they bear a power loss. The same holds from when the command is over, for what
    hangs in the interpreter's end.
    """

    def __init__(self) -> None:
        self._ending_since: float | None = None

    def take_over(self) -> None:
        """Handle the signals from now on, save one that whoever started this process has it ignore."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        # Python tells the main thread of a signal, once it comes back from C code; a socket is told at once.
        told, ours = socket.socketpair()
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.detach(), warn_on_full_buffer=False)
        with contextlib.suppress(RuntimeError):  # no more threads: what follows will tell
            threading.Thread(target=_end_after_second, args=(told,), daemon=True).start()
        # The last hook to run, as it is the first one. After it the interpreter would restore what the system
        # does with the signals, and a run that is done would look as if it had been killed.
        atexit.register(_ignore)

    def command_is_over(self) -> None:
        """Nothing is left to be stopped: a signal that comes now changes nothing."""
        if self._ending_since is None:
            self._ending_since = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._ending_since is None:
            self._ending_since = now
            raise KeyboardInterrupt
        seconds = now - self._ending_since
        if seconds >= _AT_ONCE_AFTER_SECONDS:
            _end_at_once()
        if number == signal.SIGINT and seconds >= _SENT_TOGETHER_SECONDS:
            _write(
                f"Still ending; in {_AT_ONCE_AFTER_SECONDS:.0f} seconds at most it will be ended at once."
            )


def only_results_are_left() -> None:
    """Called by a command that has done and saved everything, before it prints what came of it."""
    # Commands that the demo runs one after the other find none: they are not its end.
    signals = click.get_current_context().find_object(StopSignals)
    if signals is not None:
        signals.command_is_over()


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_after_second(signals: socket.socket) -> None:
    """End the process some time after the second signal, whatever the main thread is at."""
    first: float | None = None
    while (told := signals.recv(1)) != b"":
        if told[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first >= _SENT_TOGETHER_SECONDS:
            time.sleep(_AT_ONCE_AFTER_SECONDS)
            _end_at_once()


def _end_at_once() -> None:
    _write("Ended at once. What was committed before is kept.")
    os._exit(STATUS)


def _write(line: str) -> None:
    """To stderr, past Python's buffers: a handler may have broken into their own work."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"\n{line}\n".encode())
