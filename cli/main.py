"""The command group, and how errors, signals and log lines reach the user."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from mirip_fast import __version__
from mirip_fast.errors import ConfigError, MiripError
from mirip_fast.language import language, language_of_terminal, languages, set_language, tr
from mirip_fast.runtime import any_works, reached_limit

from .interrupted import STATUS as INTERRUPTED
from .interrupted import Interrupted, StopSignals

#: Commands in the order of the help page; each is a function of its name in the module of its name.
COMMANDS = (
    "embed", "audit", "train", "sweep", "evaluate", "use", "rank", "unsort", "compare", "explain", "similar",
    "duplicates", "label", "serve", "export", "split", "cache", "verify", "benchmark", "demo", "config",
)  # fmt: skip


class _Commands(click.Group):
    """Loads a command's module when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{name}", __package__)
        command: click.Command = getattr(module, f"{name}_command")
        _take_anywhere(command)
        return _translated(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a mistyped name is answered with the one that was meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0].lower(), COMMANDS, 1)
            hint = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{args[0]}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with its first sentence in full, where click would cut it off."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str(limit=200))
                    for name, command in found
                    if command
                ]
            )


def _say_less_or_more(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        level = logging.WARNING if parameter.name == "quiet" else logging.DEBUG
        package = logging.getLogger("mirip_fast")
        package.setLevel(level)
        for handler in package.handlers if level == logging.DEBUG else ():
            handler.setFormatter(_Lines("%(relativeCreated)6d ms  %(message)s"))


def _anywhere(hidden: bool) -> list[click.Option]:
    """The options that stand before a command or after it."""
    return [
        click.Option(
            ["--traceback"], is_flag=True, expose_value=False, hidden=hidden,
            help="Show where in the program an error arose.",
        ),
        click.Option(
            ["--quiet", "-q"], is_flag=True, expose_value=False, hidden=hidden,
            callback=_say_less_or_more, help="Print results, warnings and errors only.",
        ),
        click.Option(
            ["--verbose", "-v"], is_flag=True, expose_value=False, hidden=hidden,
            callback=_say_less_or_more, help="Print also when each line came, and details.",
        ),
        click.Option(  # run() has looked for it before anything is said
            ["--lang"], type=click.Choice(languages()), expose_value=False, hidden=hidden,
            help="Language to speak (default: the terminal's, where there is a translation).",
        ),
    ]  # fmt: skip


def _take_anywhere(command: click.Command) -> None:
    """Let a command, and those below it, take what stands before it as well; once."""
    if not any(parameter.name == "quiet" for parameter in command.params):
        command.params += _anywhere(hidden=True)
        _tell_twice(command)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _take_anywhere(below)


def _translated(command: click.Command) -> click.Command:
    """The command with its help, and that of those below it, in the language that is spoken."""
    if language() == "en":
        return command
    found = copy.copy(command)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    found.help = "\n\n".join(
        p if p.startswith("\b") else tr(" ".join(p.split())) for p in paragraphs
    )
    found.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in found.params:
        if isinstance(parameter, click.Option) and parameter.help:
            parameter.help = "  ".join(map(tr, parameter.help.split("  ")))  # and its default
    if isinstance(found, click.Group):
        found.commands = {name: _translated(below) for name, below in found.commands.items()}
    return found


def _language_of(arguments: list[str]) -> str:
    """The language that ``--lang`` names among the arguments, else the terminal's."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--lang":
            value = value or "".join(arguments[number + 1 : number + 2])
            return value if value in languages() else "en"  # which click then refuses
    return language_of_terminal()


def _tell_twice(command: click.Command) -> None:
    """Have a command tell of options given twice, of which the last value counts.

    So do commands of a shell's alias or a script, to which a user adds an option: they are not refused.
    """
    parse = command.parse_args

    def parse_args(context: click.Context, args: list[str]) -> list[str]:
        values, _, order = command.make_parser(context).parse_args(args=list(args))
        for option in dict.fromkeys(order):
            if not isinstance(option, click.Option) or option.multiple or option.count:
                continue
            told = f"{' / '.join(option.opts)} is given {order.count(option)} times"
            if not option.is_flag and order.count(option) > 1:
                _say(f"{told}: the last value counts, {values.get(option.name or '')}")
            both = [
                [n for n in names if n in args] for names in (option.opts, option.secondary_opts)
            ]
            if option.is_flag and all(both):
                _say(f"{both[0][0]} and {both[1][0]} are given: the last one counts")
        return parse(context, args)

    command.parse_args = parse_args  # type: ignore


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]},
    params=_anywhere(hidden=False),
)  # fmt: skip
@click.version_option(__version__, "-V", "--version", prog_name="mirip-fast")
def cli() -> None:
    """Learn a grader's taste from tiered artwork, and sort a portfolio.

    \b
    mirip-fast embed data/          look at every image once (frozen backbone)
    mirip-fast train --head-only    learn from the cached features, in seconds
    mirip-fast rank folder/         sort a folder by score
    """


class _Lines(logging.Formatter):
    """Warnings in yellow, where the terminal has colours."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace(record.getMessage(), tr(record.getMessage()))
        return _coloured(line, "yellow") if record.levelno >= logging.WARNING else line


def _coloured(text: str, colour: str) -> str:
    """The text in a colour, in a terminal; NO_COLOR (no-color.org) turns colours off."""
    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():
        return text
    return click.style(text, fg=colour)


class _AboveBars(logging.StreamHandler[TextIO]):
    """Lines stand above a bar that is shown, not in it."""

    def emit(self, record: logging.LogRecord) -> None:
        # Another thread may be importing it.
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with bars.external_write_mode(self.stream) if bars else contextlib.nullcontext():
            super().emit(record)


def _log_to_terminal() -> None:
    handler = _AboveBars(sys.stderr)
    handler.setFormatter(_Lines("%(message)s"))
    package = logging.getLogger("mirip_fast")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of fonts that lack a weight


def main() -> None:
    """Run the command line and exit: 0 done, 1 an error told, 2 wrong usage, 130 interrupted.

    SIGTERM ends a run as Ctrl-C does: after what is committed. See :class:`StopSignals`.
    """
    signals = StopSignals()
    signals.take_over()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch's threads sleep while they wait for each other. By default they spin, which beside another busy
    # program makes two threads ten times slower than one. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8, terminals that are not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:], signals)
    signals.command_is_over()
    if any_works():
        # A pass that could not be broken off in time. The interpreter's end would abort it inside torch, and
        # with it the process; all that is to be kept is on the disk.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str], signals: StopSignals | None = None) -> int:
    """Run one command; errors become messages and an exit status.

    Args:
        arguments: of the command line.
        signals: told by the command when it is over, if they are taken over.
    """
    show_traceback = "--traceback" in arguments
    set_language(_language_of(arguments))
    _log_to_terminal()
    try:
        _require_working_folder()
        result: Any = cli.main(
            arguments, prog_name="mirip-fast", standalone_mode=False, obj=signals
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        text = tr(error.format_message())
        told = click.ClickException(text)
        if isinstance(error, click.UsageError):
            told = click.UsageError(text, error.ctx)
        told.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__  # click wraps it
        how = (
            str(cause) if isinstance(cause, Interrupted) else "The same command goes on from there."
        )
        _say(f"Stopped. What was saved is kept. {how}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MiripError, OSError) as error:
        if show_traceback:
            raise
        limit = reached_limit(error.__cause__ if isinstance(error, MiripError) else error)
        _say(_coloured("Error:", "red") + f" {tr(_text(error))}" + (f"\n{limit}" if limit else ""))
        return 1
    except Exception as error:
        if show_traceback:
            raise
        if limit := reached_limit(error):
            _say(_coloured("Error:", "red") + f" {limit} ({type(error).__name__}: {error})")
            return 1
        _say(
            _coloured("Error:", "red")
            + f" {type(error).__name__}: {error}\nThis is a fault of mirip-fast itself. "
            "`mirip-fast --traceback …` shows where; please report it."
        )
        return 1


def _require_working_folder() -> None:
    """Without one libraries fail in ways of their own."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "The working folder is gone: it was deleted or replaced after this shell had entered it. "
            'Change to one that is there (a new one of the same name: cd "$PWD")'
        ) from None


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, MiripError):
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    return str(error)


def _say(text: str) -> None:
    click.echo(tr(text), err=True)
