"""The page where pairs are judged, on a local server: see :mod:`mirip_fast.serving`."""

from __future__ import annotations

import getpass
import logging
import shlex
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.closing import Closing
from mirip_fast.config import Config
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.pair_files import read_pairs
from mirip_fast.data.splits import SPLITS
from mirip_fast.data.table import joined
from mirip_fast.errors import (
    CheckpointError,
    ImageError,
    MiripError,
    RunNotFoundError,
)
from mirip_fast.features.embed import Progress
from mirip_fast.files import remove_abandoned_folders
from mirip_fast.label.choice import MEASURE, REPEAT, TEACH, Chooser, Judgement, Pair
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.session import Session, StalePairError
from mirip_fast.label.works import Retrainer, Works, prepare_works, training_config
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.serving import (
    BadRequestError,
    Guard,
    LocalServer,
    has_token,
    jpeg_picture,
    sent_json,
)
from mirip_fast.settings import Resolved

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page")
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "label.css": ("label.css", "text/css; charset=utf-8"),
    "label.js": ("label.js", "text/javascript; charset=utf-8"),
    "words.js": ("words.js", "text/javascript; charset=utf-8"),
}
_MOST_BYTES = 4096  # of what the page sends
_MOST_DIGITS = 10  # of a picture's number
_SIDE = 1600  # longest side of a picture on the page, in pixels
_KEPT = 16  # pictures kept in memory: those on the page, those ahead, and a few for undo


class LabelServer(LocalServer):
    """Serves one session until it is stopped.

    Args:
        session: takes the verdicts.
        picture: number of a work → its JPEG file, see :func:`jpeg_of`.
        port: where to listen; 0 takes a free one.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, session: Session, picture: Callable[[int], bytes], port: int = 0):
        super().__init__(lambda token: make_app(session, picture, token), port)


def make_app(session: Session, picture: Callable[[int], bytes], token: str) -> Starlette:
    """The web application, as of :class:`LabelServer`: the page, its pictures, and what it can do."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def page(request: Request) -> Response:
        name, kind = _FILES.get(request.path_params.get("name", ""), ("", ""))
        if not name:
            return Response("Not found", 404, media_type="text/plain")
        return Response((_PAGE / name).read_bytes(), media_type=kind)

    def image(request: Request) -> Response:
        number = request.path_params["number"]
        if not (number.isascii() and number.isdecimal() and len(number) < _MOST_DIGITS):
            return Response("Not found", 404, media_type="text/plain")
        try:
            data = picture(int(number))
        except ImageError as error:
            return Response(str(error), 404, media_type="text/plain; charset=utf-8")
        # The address holds the session's token: no other session sees what a browser has kept.
        kept = {"Cache-Control": "private, max-age=3600"}
        return Response(data, media_type="image/jpeg", headers=kept)

    def state(request: Request) -> Response:
        return JSONResponse(session.state())

    def judge(said: dict[str, Any]) -> None:
        number, label = _whole(said, "number"), _whole(said, "label", (-1, 0, 1))
        session.judge(number, label, _seconds(said.get("seconds")))

    def post(
        act: Callable[[dict[str, Any]], None],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if not has_token(request, token):
                return JSONResponse({"error": "the token is missing"}, 403)
            try:
                said = await sent_json(request, _MOST_BYTES)
                await run_in_threadpool(act, said)
                return JSONResponse(await run_in_threadpool(session.state))
            except StalePairError as error:
                return JSONResponse({"error": str(error)}, 409)
            except BadRequestError as error:
                return JSONResponse({"error": str(error)}, 400)
            except (MiripError, OSError) as error:  # the judge is told on the page
                log.error("Not saved: %s", error)
                return JSONResponse({"error": str(error)}, 500)

        return answer

    routes = [
        Route("/{token}/", page),
        Route("/{token}/state", state),
        Route("/{token}/image/{number}", image),
        Route("/{token}/judge", post(judge), methods=["POST"]),
        Route(
            "/{token}/skip",
            post(lambda said: session.skip(_whole(said, "number"))),
            methods=["POST"],
        ),
        Route("/{token}/undo", post(lambda said: session.take_back()), methods=["POST"]),
        Route("/{token}/{name}", page),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)])


def _whole(said: dict[str, Any], key: str, allowed: tuple[int, ...] | None = None) -> int:
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed and value not in allowed):
        raise BadRequestError(f"{key} is missing or wrong")
    return value


def _seconds(value: object) -> float:
    """The time a judge took, in seconds; 0 where the page says nothing sensible."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return 0.0


def jpeg_of(works: Works, number: int) -> bytes:
    """A work as the browser gets it: decoded, made small, written anew. No byte of its file reaches it.

    The file must still hold the bytes that were embedded: whatever has been put in its place since, be it a
    link to somewhere else, is not shown.

    Raises:
        ImageError: no such work, or its file can not be read or is another by now.
    """
    if not (0 <= number < len(works) and works.shown[number]):
        raise ImageError("there is no such work")
    sha256 = works.images.hashes[number]

    return jpeg_picture(works.path(number), sha256, _SIDE)


class LabelRun(Closing):
    """A session with its server, ready to run; closing it lets go of the file.

    Args:
        works: what is judged.
        out: the file of judgements; an existing one is gone on from.
        config: the settings.
        model: a model that is there already: it predicts until one is trained.
        port: where to listen; 0 takes a free one.

    Raises:
        DataError: the file is in use, foreign or faulty.
        ConfigError: the port is taken.
    """

    def __init__(
        self, works: Works, out: Path, config: Config, model: ScoreModel | None, port: int = 0
    ):
        self._works, self._config = works, config
        self.file = JudgementFile(out.absolute())
        session: Session | None = None
        try:
            if self.file.mended:
                log.warning("%s", self.file.mended)
            judged = _judgements_of(works, self.file)
            # Another session draws other pairs, and the same one again where nothing was judged.
            seed = config.train.seed + len(judged)
            splits = {split: works.in_split(split) for split in SPLITS}
            session = Session(
                self.file, works.name,
                Chooser(splits, works.features, works.blocks, config.label, seed),
                judged, judge=config.label.judge or _login(), retrain_every=config.label.retrain_every,
                start=None if model is None else model.score(works.store, works.images.hashes),
            )  # fmt: skip
            self.server = LabelServer(
                session, lru_cache(_KEPT)(lambda number: jpeg_of(works, number)), port
            )
            training = training_config(config, self.file.path)
            session.train_with(Retrainer(training, works, session.retrained))
        except BaseException:
            if session is not None:
                session.close()
            self.file.close()
            raise
        self.session = session

    def close(self) -> None:
        """Stop what goes on in the background and let go of the file."""
        self.session.close()
        self.file.close()

    def next_command(self) -> str:
        """What to type to train on the judgements, with the split that the session had."""
        config, plain = self._config, Config()
        words = ["mirip-fast", "train", "--head-only", "--pairs", shown(self.file.path)]
        words += ["--data", shown(self._works.dataset.source)]
        for name in ("train_ratio", "val_ratio", "test_ratio", "split_seed", "near_groups"):
            value = getattr(config.split, name)
            if value != getattr(plain.split, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        if config.embed.cache_dir != plain.embed.cache_dir:
            words += ["--cache-dir", config.embed.cache_dir]
        return shlex.join(words)


def open_label(
    folder: Path,
    out: Path,
    resolved: Resolved,
    *,
    checkpoint: Path | None = None,
    port: int = 0,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> LabelRun:
    """Embed what is missing, read what was judged before, and get a session ready.

    Args:
        folder: folder of images or CSV file, with grades or without.
        out: the file of judgements.
        resolved: the settings, and which of them were given.
        checkpoint: run whose model predicts at first; None for the newest one that fits.
        port: where to listen; 0 takes a free one.
        command: what is running, for whoever finds the store locked.
        progress: called while images are embedded.

    Raises:
        MiripError: the works, the file or the port can not be used; says why.
    """
    remove_abandoned_folders()  # of servers that were killed while a head was trained
    works = prepare_works(folder, resolved, command=command, progress=progress)
    sizes = ", ".join(f"{split} {len(works.in_split(split))}" for split in SPLITS)
    log.info("%s to judge (%s)", counted(int(works.shown.sum()), "work"), sizes)
    model = _model(works, checkpoint, Path(resolved.config.train.output_dir))
    return LabelRun(works, out, resolved.config, model, port)


def _judgements_of(works: Works, file: JudgementFile) -> list[Judgement]:
    """What was judged before; judgements by other programs have neither kind nor prediction."""
    if not file.has_rows:
        return []
    manifest = works.images.manifest
    places = [*manifest.places, manifest.root]
    read = read_pairs([file.path], joined([manifest.table, works.others]), places)
    log.info("%s: going on after %s", shown(file.path), counted(len(read), "judgement"))
    judged = []
    for (one, other), label, extra in zip(
        read.images.tolist(), read.label.tolist(), read.extra, strict=True
    ):
        if one < len(works) and other < len(works):
            kind = extra.get("kind", "")
            predicted = {"1": 1, "-1": -1}.get(extra.get("predicted", "").strip())
            pair = Pair(one, other, kind if kind in (MEASURE, REPEAT) else TEACH)
            judged.append(Judgement(pair, label, predicted))
    return judged


def _model(works: Works, checkpoint: Path | None, output_dir: Path) -> ScoreModel | None:
    """The model to begin with; one that was not asked for need not be there, nor fit."""
    try:
        model = pick_model(checkpoint, output_dir)
        model.require_one_backbone("label")
        if model.info.fingerprint != works.store.fingerprint:
            raise CheckpointError(
                f"{model.checkpoint} looks at other features than those of {shown(works.store.path)}"
            )
        model.score(works.store, works.images.hashes[:1])  # all its views and kinds are there
        return model
    except MiripError as error:
        if checkpoint is not None:
            raise
        if not isinstance(error, RunNotFoundError):
            log.info("Beginning without a model: %s", error)
    return None


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in a container
        return "judge"
