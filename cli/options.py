"""Command line options made from the configuration's settings, and the project file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mirip_fast.config import PROJECT_FILE
from mirip_fast.settings import Setting, resolve, settings

#: What an option or argument names: a file or a folder, a file, a folder.
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)

#: Settings of commands that score pictures with a trained model, and of those that read a table of works.
SCORES = (
    "train.output_dir", "embed.cache_dir", "embed.embed_batch_size", "embed.workers",
    "embed.max_megapixels", "runtime",
)  # fmt: skip
WORKS = (
    "data.by", "data.id_column", "data.image_column", "data.image_root", "data.separator",
    "data.encoding", "data.sheet",
)  # fmt: skip


def config_options(
    *sections: str, **renamed: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of some sections; it receives a ``Resolved`` as its first argument.

    Args:
        sections: sections of the configuration (``embed``) or single settings (``embed.cache_dir``).
        renamed: setting name → flag, where a command calls a setting by another name.
    """
    chosen = [s for s in settings() if s.section in sections or s.key in sections]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(*args: Any, config: tuple[Path, ...], **kwargs: Any) -> Any:
            given = {s.key: kwargs.pop(_variable(s)) for s in chosen}
            project = Path(PROJECT_FILE)
            files = (project, *config) if project.is_file() else config
            return command(resolve(files, given), *args, **kwargs)

        command_with_options: Callable[..., Any] = wrapper
        for setting in reversed(chosen):
            flag = renamed.get(setting.name, setting.flag)
            command_with_options = _option(setting, flag)(command_with_options)
        return click.option(
            "--config",
            multiple=True,
            type=PATH,
            help=f"YAML file with settings; {PROJECT_FILE} in the working folder is read without it.",
        )(command_with_options)

    return decorate


def _option(setting: Setting, flag: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    text = f"{setting.help}  [default: {setting.default_text or 'none'}]"
    name = _variable(setting)
    if setting.kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    # Choices and types are checked by the setting itself, so that YAML and flags say the same.
    metavar = "|".join(setting.choices) or {str: "TEXT", int: "N", float: "X"}[setting.kind]
    if setting.several:
        return click.option(flag, name, multiple=True, metavar=metavar, help=text, callback=_listed)
    return click.option(flag, name, default=None, metavar=metavar, help=text)


def _listed(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    return list(values) or None


def _variable(setting: Setting) -> str:
    return f"{setting.section}_{setting.name}"


def given_flags(*prefixes: str) -> list[str]:
    """The options of the running command that were typed, of settings whose section starts so."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and parameter.name.startswith(prefixes)
        and context.get_parameter_source(parameter.name) is typed
    ]


def command_line() -> str:
    """The command as it was typed, for whoever finds the store locked."""
    return " ".join(["mirip-fast", *sys.argv[1:]])


#: For commands that use a trained model.
checkpoint_option = click.option(
    "--checkpoint", type=PATH,
    help="Run or model file (default: the run of `mirip-fast use`, else the newest finished one).",
)  # fmt: skip
#: For those that need its backbone, which it knows.
moved_backbone = click.option(
    "--backbone", multiple=True, callback=lambda *given: ",".join(given[2]) or None,
    help="Where the model's backbone is now, if it moved (default: where it was).",
)  # fmt: skip
