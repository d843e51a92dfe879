"""Printing in the language that is spoken."""

from __future__ import annotations

import click

from mirip_fast.language import tr

_WIDTH = 100


def echo(text: str = "", *, err: bool = False, red: bool = False) -> None:
    """Print a text, translated where there is a translation.

    Args:
        text: in English.
        err: to standard error.
        red: in red, where the terminal has colours.
    """
    click.secho(tr(text), err=err, fg="red" if red else None)


def wrapped(text: str) -> str:
    """A long text, translated and in lines of 100 columns."""
    return click.wrap_text(tr(text), width=_WIDTH)
