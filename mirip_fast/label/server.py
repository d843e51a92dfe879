"""The page where works are judged, on a local server: see :mod:`mirip_fast.serving`."""

from __future__ import annotations

import getpass
import logging
import secrets
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import Config
from mirip_fast.data.pair_files import read_pairs
from mirip_fast.data.splits import SPLITS
from mirip_fast.data.table import joined
from mirip_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ImageError,
    MiripError,
    RunNotFoundError,
)
from mirip_fast.features.embed import OnProgress
from mirip_fast.files import remove_abandoned_folders
from mirip_fast.label.choice import MEASURE, REPEAT, TEACH, Chooser, Pair
from mirip_fast.label.grading import GradeFile, Grading, grading_order
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.session import Session
from mirip_fast.label.works import LabelWorks, Retrainer, prepare_works, training_config
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.runtime import Closing
from mirip_fast.serving import (
    HOST,
    BadRequestError,
    Guard,
    LocalServer,
    answer_change,
    jpeg_picture,
    network_addresses,
    not_found,
    picture_answer,
)
from mirip_fast.settings import Resolved
from mirip_fast.text import counted, folded, nfc, shown

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

AnySession = Session | Grading

_PAGE = Path(__file__).with_name("page")
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "label.css": ("label.css", "text/css; charset=utf-8"),
    "label.js": ("label.js", "text/javascript; charset=utf-8"),
    "words.js": ("words.js", "text/javascript; charset=utf-8"),
}
_MOST_BYTES = 4096  # of what the page sends
_MOST_DIGITS = 10  # of a picture's number
_SIDES = {
    "image": 1600,
    "thumb": 160,
}  # longest side of a picture, on the page and in its list, in pixels
_KEPT = 32  # pictures kept in memory: those on the page, those ahead, and a few for undo


def make_app(
    sessions: Mapping[str, AnySession],
    picture: Callable[[int, int], bytes],
    names: Sequence[str] = (),
) -> Starlette:
    """The web application: the page, its pictures, and what it can do.

    Args:
        sessions: token → the session that takes verdicts under it.
        picture: number of a work and longest side → its JPEG file.
        names: hosts that may be asked for, besides this machine.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def page(request: Request) -> Response:
        name, kind = _FILES.get(request.path_params.get("name", ""), ("", ""))
        if not name:
            return not_found()
        return Response((_PAGE / name).read_bytes(), media_type=kind)

    def image(request: Request) -> Response:
        number = request.path_params["number"]
        known = request.path_params["size"] in _SIDES
        if not (known and number.isascii() and number.isdecimal() and len(number) < _MOST_DIGITS):
            return not_found()
        side = _SIDES[request.path_params["size"]]
        return picture_answer(lambda: picture(int(number), side))

    def session_of(request: Request) -> AnySession:
        found = sessions.get(request.path_params["token"])
        if found is None:  # the token stood in a header
            raise HTTPException(404)
        return found

    def state(request: Request) -> Response:
        return JSONResponse(session_of(request).state())

    def listing(request: Request) -> Response:
        return JSONResponse(session_of(request).listing())

    async def act(request: Request) -> Response:
        session, what = session_of(request), request.path_params["what"]

        def change(said: dict[str, Any]) -> dict[str, Any]:
            _act(session, what, said)
            return session.state()

        return await answer_change(request, request.path_params["token"], _MOST_BYTES, change)

    routes = [
        Route("/{token}/", page),
        Route("/{token}/state", state),
        Route("/{token}/list", listing),
        Route("/{token}/{size}/{number}", image),
        Route("/{token}/{what}", act, methods=["POST"]),
        Route("/{token}/{name}", page),
    ]
    guard = Middleware(Guard, token=list(sessions), names=names)
    return Starlette(routes=routes, middleware=[guard])


def _act(session: AnySession, what: str, said: dict[str, Any]) -> None:
    """Do what the page asks for."""
    if what == "undo":
        return session.take_back(_whole(said, "row") if "row" in said else None)
    if what == "four" and isinstance(session, Session):
        return session.show_four(said.get("on") is True)
    number = _whole(said, "number")
    if what == "skip":
        return session.skip(number)
    if what == "judge" and isinstance(session, Grading):
        return session.grade(number, _whole(said, "label"))
    if what == "judge" and isinstance(session, Session):
        order, seconds = said.get("order"), _seconds(said.get("seconds"))
        if order is None:
            return session.judge(number, _whole(said, "label", (-1, 0, 1)), seconds)
        if isinstance(order, list) and all(type(work) is int for work in order):
            return session.order(number, order, seconds)
    raise BadRequestError(f"{what} is not known here")


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


class LabelRun(Closing):
    """The sessions of one judge or several with their server, ready to run; closing it lets go of the file.

    What is missing is embedded, and what was judged before is read.

    Args:
        folder: folder of images or CSV file, with grades or without.
        out: the file of judgements; an existing one is gone on from.
        resolved: the settings, and which of them were given.
        checkpoint: run whose model predicts until one is trained; None for the newest one that fits.
        port: where to listen; 0 takes a free one.
        grade: take a tier of each work instead of comparing works.
        again: ask for works that have a grade, too.
        four: begin with four works at once.
        share: listen on the network, too.
        command: what is running, for whoever finds the store locked.
        progress: called while images are embedded.

    Attributes:
        works: what is judged.
        sessions: one per judge.
        server: serves them all; its ``address`` is that of the first one's page.
        addresses: of each session's page, its token included.

    Raises:
        DataError: the works cannot be used; the file is in use, foreign or faulty; nothing is left to grade.
        ConfigError: the port is taken, or a judge can have no such name.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        resolved: Resolved,
        *,
        checkpoint: Path | None = None,
        port: int = 0,
        grade: bool = False,
        again: bool = False,
        four: bool = False,
        share: bool = False,
        command: str = "",
        progress: OnProgress = lambda *_: None,
    ):
        remove_abandoned_folders()  # of servers that were killed while a head was trained
        self._config = config = resolved.config
        judges = judge_names(config.label.judge)  # told before anything is embedded
        self.works = works = prepare_works(
            folder, resolved, compared=not grade, command=command, progress=progress
        )
        parts = "" if grade else ", ".join(f"{s} {len(works.in_split(s))}" for s in SPLITS)
        log.info("%s to judge%s", counted(int(works.shown.sum()), "work"), parts and f" ({parts})")
        model = _model(works, checkpoint, Path(config.train.output_dir))
        out = out.absolute()
        self.file = GradeFile(out, works) if grade else JudgementFile(out)
        self.sessions: list[AnySession] = []
        self._retrainer: Retrainer | None = None
        try:
            if self.file.mended:
                log.warning("%s", self.file.mended)
            if isinstance(self.file, GradeFile):
                order = _to_grade(works, self.file, model, again, config.train.seed)
                self.sessions += [Grading(self.file, order, name, again=again) for name in judges]
            else:
                self._compare(self.file, judges, model, four)
            names = network_addresses() if share else [HOST]
            own = (*names, socket.gethostname().lower()) if share else ()
            by_token = {secrets.token_urlsafe(24): session for session in self.sessions}
            picture = lru_cache(_KEPT)(self._picture)
            first, *_ = by_token
            self.server = LocalServer(
                lambda _: make_app(by_token, picture, own), port,
                host="0.0.0.0" if share else HOST, token=first, name=names[0],
            )  # fmt: skip
            self.addresses = [self.server.address.replace(first, token) for token in by_token]
        except BaseException:
            self.close()
            raise

    def _compare(
        self, file: JudgementFile, judges: Sequence[str], model: ScoreModel | None, four: bool
    ) -> None:
        works, config = self.works, self._config
        judged = _judgements_of(works, file)
        splits = {split: works.in_split(split) for split in SPLITS}
        start = None if model is None else model.score(works.store, works.images.hashes)
        sessions = []
        for place, name in enumerate(judges):
            # Another session draws other pairs, and the same one again where nothing was judged.
            seed = config.train.seed + len(judged) + 7919 * place
            chooser = Chooser(splits, works.features, works.blocks, config.label, seed)
            every = config.label.retrain_every
            sessions.append(
                Session(
                    file, works.name, chooser, judged, judge=name, retrain_every=every, start=start
                )
            )
            self.sessions.append(sessions[-1])
            if four:
                sessions[-1].show_four(True)

        def retrained(judgements: int, answer: dict[str, Any], seconds: float) -> None:
            for session in sessions:
                session.retrained(judgements, answer, seconds)

        self._retrainer = Retrainer(training_config(config, file.path), works, retrained)
        for session in sessions:
            session.train_with(self._retrainer)

    def _picture(self, number: int, side: int) -> bytes:
        """A work as the browser gets it, as a JPEG file; see :func:`jpeg_picture`."""
        works = self.works
        if not (0 <= number < len(works) and works.shown[number]):
            raise ImageError("there is no such work")
        return jpeg_picture(works.path(number), works.images.hashes[number], side)

    @property
    def session(self) -> Any:
        """The first judge's."""
        return self.sessions[0]

    def close(self) -> None:
        """Stop what goes on in the background and let go of the file."""
        for session in self.sessions:
            session.close()
        if self._retrainer is not None:
            self._retrainer.close()
        self.file.close()

    def next_command(self) -> str:
        """What to type to train on the judgements, with the split that the session had."""
        if isinstance(self.file, GradeFile):
            again = self.works.dataset.embed_command(source=shown(self.file.path))
            root = self.works.images.root
            elsewhere = not root.is_relative_to(self.file.path.parent)
            if elsewhere and "--image-root" not in again:
                again += " " + shlex.join(["--image-root", shown(root)])
            return again
        config, plain = self._config, Config()
        words = ["mirip-fast", "train", "--head-only", "--pairs", shown(self.file.path)]
        words += ["--data", shown(self.works.dataset.source)]
        for name in ("train_ratio", "val_ratio", "test_ratio", "split_seed", "near_groups"):
            value = getattr(config.split, name)
            if value != getattr(plain.split, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        if config.embed.cache_dir != plain.embed.cache_dir:
            words += ["--cache-dir", config.embed.cache_dir]
        return shlex.join(words)


def judge_names(given: str | None) -> list[str]:
    """The judges that ``--judge`` names, or who is logged in.

    Raises:
        ConfigError: a name is empty, given twice, or none that a file of grades can have.
    """
    names = [_login()] if given is None else [nfc(name.strip()) for name in given.split(",")]
    for name in names:
        alike = [other for other in names if folded(other) == folded(name)]
        if not folded(name) or folded(name) == "score" or len(alike) > 1:
            raise ConfigError(
                f"--judge {name}: each judge needs a name of their own"
                + (f"; {' and '.join(alike)} are read as one" if len(alike) > 1 else "")
            )
    return names


def _to_grade(
    works: LabelWorks, file: GradeFile, model: ScoreModel | None, again: bool, seed: int
) -> list[int]:
    """The works in the order in which they are graded; tells what is left out."""
    if file.unknown:
        log.warning(
            "%s: %s of other works; they are left as they are",
            *(shown(file.path), counted(file.unknown, "row")),
        )
    order = grading_order(works, model, again=again, seed=seed)
    known = int(works.shown.sum()) - len(order)
    if known:
        log.warning(
            "Not asked for, as the data has a tier already: %s (--again asks)",
            counted(known, "work"),
        )
    if not order:
        raise DataError(
            "Nothing is left to grade: every work has a tier in the data (--again asks)"
        )
    return order


def _judgements_of(works: LabelWorks, file: JudgementFile) -> list[Pair]:
    """What was judged before; judgements by other programs have neither kind nor prediction."""
    if not file.rows:
        return []
    manifest = works.images
    places = [*manifest.places, manifest.root]
    read = read_pairs([file.path], joined([manifest.table, works.others]), places)
    log.info("%s: going on after %s", shown(file.path), counted(len(read), "judgement"))
    judged = []
    for said, row in zip(read.to_dict("records"), file.rows, strict=True):
        one, other, label = said["one"], said["other"], said["label"]
        if one < len(works) and other < len(works):
            kind = said.get("kind", "")
            predicted = {"1": 1, "-1": -1}.get(said.get("predicted", "").strip())
            kind = kind if kind in (MEASURE, REPEAT) else TEACH
            judge = said.get("judge", "").strip()
            judged.append(Pair(one, other, kind, label, predicted, judge, row))
    return judged


def _model(works: LabelWorks, checkpoint: Path | None, output_dir: Path) -> ScoreModel | None:
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
