"""A page for every command, made from its help text, its options and what the documents recorded of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

import click
from mirip_fast_cli.main import cli
from recorded import Recorded, recorded

from mirip_fast.config import Config
from mirip_fast.settings import Setting, settings

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS / "commands"
#: Documents whose recorded commands the pages quote, in this order.
QUOTED = ("tutorial.md", "examples.md")
_MADE = "<!-- Made from the code by `make docs`; change the help texts instead. -->\n"
_SETTINGS = {f"{setting.section}_{setting.name}": setting for setting in settings()}
_TABLE = ["| option | default | meaning |", "|---|---|---|"]


def command_pages() -> dict[Path, str]:
    """Path → page, one for each command that ``mirip-fast --help`` lists."""
    return {FOLDER / f"{name}.md": _page(name, command) for name, command in commands().items()}


def commands() -> dict[str, click.Command]:
    """Name → command, in the order of the help page."""
    context = click.Context(cli, info_name="mirip-fast")
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command and not command.hidden}


def first_sentence(command: click.Command) -> str:
    """What a command does, as the help page's list has it."""
    return command.get_short_help_str(limit=200).rstrip(".") + "."


def _page(name: str, command: click.Command) -> str:
    parts = [_MADE, f"# mirip-fast {name}\n", *_description(f"mirip-fast {name}", command)]
    if isinstance(command, click.Group):
        for sub, subcommand in command.commands.items():
            full = f"mirip-fast {name} {sub}"
            parts += [f"## {full}\n", *_description(full, subcommand), *_options(subcommand, "###")]
    else:
        parts += _options(command, "##")
    examples = _examples(f"mirip-fast {name}")
    if examples:
        parts += ["## Examples\n", *examples]
    parts.append("[All pages](../README.md)\n")
    return "\n".join(parts)


def _description(full_name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=full_name)
    usage = " ".join([full_name, *command.collect_usage_pieces(context)])
    return [f"```\n{usage}\n```\n", *_paragraphs(command.help or "")]


def _paragraphs(help_text: str) -> list[str]:
    """Paragraphs of a help text; one that click shall not wrap (``\\b``) becomes a code block."""
    paragraphs = []
    for paragraph in inspect.cleandoc(help_text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            paragraphs.append(f"```\n{paragraph[2:]}\n```\n")
        else:
            paragraphs.append(paragraph.strip() + "\n")
    return paragraphs


def _options(command: click.Command, heading: str) -> list[str]:
    """Tables: the command's own options, then the settings, which ``mirip.yaml`` can hold too."""
    own, shared = [], []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            (shared if parameter.name in _SETTINGS else own).append(parameter)
    parts = []
    if own:
        parts += [f"{heading} Options\n", _table(_own_row(option) for option in own)]
    if shared:
        parts += [f"{heading} Settings\n", "These can be set in `mirip.yaml`, too.\n"]
    for section in dict.fromkeys(_SETTINGS[option.name or ""].section for option in shared):
        meaning = (type(getattr(Config(), section)).__doc__ or "").strip()
        rows = [
            _setting_row(option, _SETTINGS[option.name or ""])
            for option in shared
            if _SETTINGS[option.name or ""].section == section
        ]
        parts += [f"**`{section}:`** {meaning}\n", _table(rows)]
    return parts


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    return "\n".join([*_TABLE, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _own_row(option: click.Option) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        names = names.removesuffix("`") + f" {_value(option)}`"
    default = option.default if not option.is_flag and option.show_default else None
    choices = ""
    if isinstance(option.type, click.Choice):
        choices = f" One of {', '.join(map(str, option.type.choices))}."
    meaning = (option.help or "") + choices
    return names, "" if default in (None, ()) else str(default), meaning.strip()


def _value(option: click.Option) -> str:
    """What stands behind an option's name: its metavar, its choices, or the kind of value."""
    if option.metavar is not None:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    kinds = {click.types.IntParamType: "N", click.types.FloatParamType: "X", click.Path: "PATH"}
    return next((name for kind, name in kinds.items() if isinstance(option.type, kind)), "TEXT")


def _setting_row(option: click.Option, setting: Setting) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    choices = f" One of {', '.join(setting.choices)}." if setting.choices else ""
    return names, setting.default_text or "none", setting.help + choices


def _examples(full_name: str) -> list[str]:
    parts = []
    for document in QUOTED:
        text = (DOCS / document).read_text(encoding="utf-8")
        mine = [example for example in recorded(text) if _is_of(example, full_name)]
        if mine:
            parts += [f"From [{document}](../{document}):\n", *(e.block + "\n" for e in mine)]
    return parts


def _is_of(example: Recorded, full_name: str) -> bool:
    return example.command == full_name or example.command.startswith(full_name + " ")
