"""``mirip-fast config``: every setting with its value and what it does."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import PROJECT_FILE
from mirip_fast.settings import resolve, to_yaml

from .options import PATH


@click.command("config")
@click.option("--config", "files", multiple=True, type=PATH, help="YAML files.")
def config_command(files: tuple[Path, ...]) -> None:
    """Print all settings as YAML, as they are resolved in this folder.

    `mirip-fast config > mirip.yaml` is a start for a project's own settings.
    """
    project = Path(PROJECT_FILE)
    chosen = (project, *files) if project.is_file() else files
    click.echo(to_yaml(resolve(chosen).config, comments=True), nl=False)
