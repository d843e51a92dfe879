"""Ctrl-C and SIGTERM in processes of their own: one stops a command, more of them break nothing; and what a
command says that cannot have the memory, the threads or the working folder that it needs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from made_run import TINY, draw
from mirip_fast_cli.main import run

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])

#: What every script begins with; ``told`` signals this very process.
BEGIN = """
import atexit, ctypes, os, signal, sys, threading, time
import click
from mirip_fast_cli import interrupted, main

number = signal.Signals(int(sys.argv.pop(1)))

def told():
    os.kill(os.getpid(), number)

def say(text):
    print(text, file=sys.stderr, flush=True)

def instead(body):
    main._Commands.get_command = lambda *_: click.command("config")(body)
    sys.argv[1:] = ["config"]
    main.main()
"""

EMBED = """
from mirip_fast.features.engine import Engine

stop, finish = Engine.stop, Engine.finish

def first(engine, tick):
    told()
    finish(engine, tick)

def cleaning_up(engine):
    told()
    stop(engine)
    told()
    say("the engine has stopped")

Engine.finish, Engine.stop = first, cleaning_up
main.main()
"""
AT_ONCE = "Ended at once. What was committed before is kept."
STOPPED = "Stopped. What was saved is kept. The same command goes on from there."

#: What happens → the command's body, its exit status and what is said in the end.
CASES = {
    "a later signal ends a clean-up that hangs": ("""
interrupted._AT_ONCE_AFTER_SECONDS = 1.0

def hang():
    try:
        told()
        time.sleep(30)
    finally:
        told()
        say("still there")
        time.sleep(1.1)
        told()
        say("never got here")
        time.sleep(30)

instead(hang)
""", 130, f"still there\n\n{AT_ONCE}\n"),
    # As a process does that waits for one that is gone, in torch's or a driver's code, to which Python's
    # handlers do not get: the signals are blocked for this thread alone.
    "a second signal ends code that never comes back": ("""
interrupted._SENT_TOGETHER_SECONDS = interrupted._AT_ONCE_AFTER_SECONDS = 0.1

def be_stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        for _ in range(2):
            time.sleep(0.3)
            told()

    threading.Thread(target=signals).start()
    ctypes.CDLL(None).sleep(30)

instead(be_stuck)
""", 130, f"{AT_ONCE}\n"),
    # It would be ended inside torch, which C++ takes for a fault of the program.
    "a thread that works on does not abort the process": ("""
import torch
from mirip_fast.runtime import WorkThread

square, begun = torch.ones(1200, 1200), threading.Event()

def work():
    while True:
        square @ square
        begun.set()

def leave_a_thread_behind():
    WorkThread("busy", work).start()
    begun.wait()
    told()
    time.sleep(30)

instead(leave_a_thread_behind)
""", 130, f"{STOPPED}\n"),
    "a signal after the end changes nothing": ("""
class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=number):  # in the interpreter's very end
        kill(process, number)

last = Last()
atexit.register(told)

def done():
    interrupted.only_results_are_left()
    told()
    click.echo("the results")

instead(done)
""", 0, "the results\n"),
    # A shell has jobs in the background ignore Ctrl-C.
    "a signal that was ignored stays so": ("""
signal.signal(number, signal.SIG_IGN)

def work():
    told()
    click.echo("the results")

instead(work)
""", 0, "the results\n"),
}  # fmt: skip

TYPED_AGAIN = """
interrupted._SENT_TOGETHER_SECONDS = 0.0

def clean_up():
    try:
        told()
        time.sleep(30)
    finally:
        told()

instead(clean_up)
"""


def ended(script: str, number: int, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """Exit status and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(int(number)), *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_signals_during_the_clean_up_do_not_break_it_off(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "data" / f"{i}.png", 0.5, i)
    code, said = ended(EMBED, signal.SIGINT, "embed", "data", *TINY, cwd=tmp_path)
    assert code == 130, said
    assert "the engine has stopped" in said and "Stopped. What was saved is kept." in said
    assert "Traceback" not in said and "Exception" not in said


@SIGNALS
@pytest.mark.parametrize("what", CASES)
def test_a_signal(what: str, number: int) -> None:
    script, code, said = CASES[what]
    found, heard = ended(script, number)
    assert (found, heard.strip()) == (code, said.strip())


@SIGNALS
def test_who_presses_again_is_told_when_that_will_do_something(number: int) -> None:
    code, said = ended(TYPED_AGAIN, number)
    typed = number == signal.SIGINT
    assert code == 130 and ("seconds at most it will be ended at once" in said) == typed
    assert "Stopped. What was saved is kept." in said


def said_by(*arguments: str, cwd: Path, before: str = "") -> tuple[int, str]:
    command = f'{before} exec "$0" -m mirip_fast_cli "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    code, said = said_by("train", "--head-only", cwd=tmp_path, before="mkdir x; cd x; rmdir ../x;")
    assert code == 1 and "Error: The working folder is gone" in said and said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_too_tight_a_limit_of_memory_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "data" / "0.png", 0.5, 0)
    code, said = said_by("embed", "data", *TINY, cwd=tmp_path, before="ulimit -v 307200;")
    assert code == 1 and "this process may have 300 MiB (ulimit -v)" in said, said
    assert "fault of mirip-fast" not in said and "Traceback" not in said


def test_threads_that_are_not_to_be_had_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    draw(tmp_path / "data" / "0.png", 0.5, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert run(["embed", "data", *TINY]) == 1
    said = capfd.readouterr().err
    assert "No more processes or threads can be started" in said and "--workers 0" in said
    assert "fault of mirip-fast" not in said
