"""``mirip-fast serve``: the page of a ranking alive, and scores of uploaded pictures over HTTP."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import (
    FOLDER,
    PATH,
    SCORES,
    WORKS,
    checkpoint_option,
    command_line,
    config_options,
    moved_backbone,
)
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.portfolio.serve import LivePage


@click.command("serve")
@click.argument("source", required=False)
@checkpoint_option
@click.option(
    "--out", type=FOLDER, default=Path(),
    help="Folder for the marks and the judged pairs that moves make (default: here).",
)  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port (default: any free).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--allow-host", multiple=True, metavar="NAME",
    help="A name that this server is asked by, too, such as that of the site before it.",
)  # fmt: skip
@click.option(
    "--token", envvar="MIRIP_FAST_TOKEN", metavar="TEXT",
    help="Secret that requests bring (default: $MIRIP_FAST_TOKEN, else a new one each time).",
)  # fmt: skip
@click.option(
    "--most-upload-mb", type=click.IntRange(min=1), default=32, show_default=True,
    help="Megabytes of one upload.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(min=1), default=16, show_default=True,
    help="Uploads that may wait; more are told to come again.",
)  # fmt: skip
@click.option("--keep", type=PATH, metavar="DIR", help="Keep uploads in DIR (default: none).")
@click.option("--no-api", is_flag=True, help="The page alone; the backbone is not loaded.")
@click.option("--no-browser", is_flag=True, help="Print the page's address without opening it.")
@click.option("--anyway", is_flag=True, help="Sort by a model that is no better than chance, too.")
@moved_backbone
@config_options(*SCORES, *WORKS)
def serve_command(
    resolved: Resolved,
    source: str | None,
    checkpoint: Path | None,
    backbone: str | None,
    out: Path,
    port: int,
    host: str,
    allow_host: tuple[str, ...],
    token: str | None,
    most_upload_mb: int,
    queue: int,
    keep: Path | None,
    no_api: bool,
    no_browser: bool,
    anyway: bool,
) -> None:
    """Open the page of a ranking so that marks and moves are kept, and score uploaded pictures over HTTP.

    SOURCE is a folder or table of works, as for `rank`; the ranking.json (or its folder) that `rank` wrote;
    or a run, whose own works are shown. Without SOURCE there is no page, only the API.

    Stars, tags, notes and the order that users give are on the disk at once, in FOLDER-marks.jsonl; what
    they moved is in FOLDER-pairs.csv, from which `train --pairs` learns. POST /score answers with score,
    0-100, tier and interval of each picture that is sent; /docs describes it.

    It is for this machine only, unless --host says otherwise: then anybody on the network who has the token
    can look at the works. Ctrl-C ends it.
    """
    from mirip_fast.errors import ConfigError
    from mirip_fast.portfolio import score_api
    from mirip_fast.portfolio.serve import works_to_serve
    from mirip_fast.ranking.evaluate import pick_model
    from mirip_fast.serving import HOST, Guard, LocalServer, require_packages

    require_packages("serve", *(() if no_api else ("python-multipart",)))
    if source is None and no_api:
        raise click.UsageError("--no-api leaves nothing to serve without SOURCE")
    if token is not None and not (len(token) >= 16 and token.isascii() and token.isalnum()):
        raise ConfigError("--token (or MIRIP_FAST_TOKEN) takes 16 letters and digits or more")
    config = resolved.config
    works, checkpoint = works_to_serve(source, checkpoint)
    model = pick_model(checkpoint, Path(config.train.output_dir))
    with ExitStack() as ending:
        page = None
        if works is not None:
            page = _live_page(ending, model, works, out, resolved, backbone, anyway)
        scorer = None
        if not no_api:
            scorer = ending.enter_context(
                score_api.Scorer(model, config, backbone=backbone, keep=keep)
            )

        def make_app(secret: str) -> Any:
            from starlette.applications import Starlette
            from starlette.middleware import Middleware

            routes = [] if page is None else page.routes(secret)
            if scorer is not None:
                most = most_upload_mb * 1_000_000
                routes = score_api.routes(scorer, most_bytes=most, queue=queue) + routes
            public = score_api.PUBLIC if scorer is not None else ()
            names = (*allow_host, *(() if host == HOST else (host,)))
            guard = Middleware(Guard, token=secret, names=names, public=public)
            return Starlette(routes=routes, middleware=[guard])

        server = LocalServer(make_app, port, host=host, token=token)
        if host != HOST:
            echo(
                f"Warning: this listens on {host}: whoever on the network has the token can ask it, and "
                "what is sent is not encrypted.",
                err=True,
            )
        if page is not None:
            echo(f"Page: {server.address}\nMarks are kept in {page.marks.path}")
        if scorer is not None:
            echo(
                f"POST http://{host}:{server.port}/score  (described at /docs)\nToken: {server.token}"
            )
        echo("Ctrl-C ends it.")
        if page is not None and not no_browser:
            click.launch(server.address)
        server.run()
        if page is not None and page.pairs:
            by = resolved.config.data.by
            by = f" --by {shlex.quote(by)}" if by else ""
            echo(f"{page.pairs} judged pairs of what was moved: {page.pairs_file}")
            echo(
                f"Next: mirip-fast train --head-only --pairs {page.pairs_file}"
                if page.trained_on is None
                else f"Next: mirip-fast train --head-only --data {shlex.quote(page.trained_on)}{by} learns "
                "them beside its grades (with --pairs all: the grades alone)"
            )


def _live_page(
    ending: ExitStack, model: Any, works: str, out: Path, resolved: Resolved,
    backbone: str | None, anyway: bool,
) -> LivePage:  # fmt: skip
    from mirip_fast.portfolio.rank import rank_folder
    from mirip_fast.portfolio.serve import LivePage

    with Bar(" images") as bar:
        done = rank_folder(
            model, works, resolved.config, backbone=backbone, anyway=anyway,
            command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    with Bar(" pictures") as bar:
        return ending.enter_context(LivePage(done, out, resolved.config, progress=bar))
