"""Printing in the language that is spoken."""

from __future__ import annotations

import click

from mirip_fast.language import tr

_WIDTH = 100


def echo(text: str = "", *, err: bool = False, red: bool = False, wrap: bool = False) -> None:
    """Print a text, translated where there is a translation.

    Args:
        text: in English.
        err: to standard error.
        red: in red, where the terminal has colours.
        wrap: in lines of 100 columns.
    """
    said = tr(text)
    click.secho(
        click.wrap_text(said, width=_WIDTH) if wrap else said, err=err, fg="red" if red else None
    )
