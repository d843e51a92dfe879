"""`serve`: the page of a ranking alive, and scores of uploaded pictures over HTTP."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import WHOLE
from mirip_fast.errors import DataError, MiripError
from mirip_fast.files import read_json
from mirip_fast.portfolio.marks import Marks, write_pairs
from mirip_fast.portfolio.page import key_of, key_of_ranking, write_page
from mirip_fast.portfolio.rank import RankDone
from mirip_fast.runtime import Closing
from mirip_fast.serving import (
    BadRequestError,
    answer_change,
    jpeg_picture,
    not_found,
    picture_answer,
)
from mirip_fast.training.run_folder import RUN_FILE, Run

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

log = logging.getLogger(__name__)

_MOST_BYTES = 16 << 20  # of what the page sends: marks of many works at once
_KEPT = 8  # pictures kept in memory
_AT_ONCE = 2  # pictures decoded at the same time
# The page itself has a stricter policy; this is what only a header can say.
_POLICY = {"Content-Security-Policy": "frame-ancestors 'none'"}


class LivePage(Closing):
    """The page of a ranking whose marks are kept as they are made.

    Args:
        done: the ranking.
        out: folder of the marks (``<folder>-marks.jsonl``) and of the judged pairs that moves make
            (``<folder>-pairs.csv``).
        config: settings of the page.
        progress: called with pictures done and their total.

    Raises:
        DataError: the file of marks is in use or another ranking's.
    """

    def __init__(
        self,
        done: RankDone,
        out: Path,
        config: Config,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self._done = done
        names = done.ranking["file"].tolist()
        self._works = {key_of(name, done.hashes[name]): name for name in names}
        title = done.root.absolute().name or "portfolio"
        self.trained_on = Run(done.model.checkpoint.parent).info.get("dataset")
        self.pairs_file = out / f"{title}-pairs.csv"
        self._ending = ExitStack()
        self.marks = Marks(out / f"{title}-marks.jsonl", key_of_ranking(done))
        self._ending.callback(self.marks.close)
        self._lock = threading.Lock()
        self._decoding = threading.BoundedSemaphore(_AT_ONCE)
        try:
            self._folder = Path(self._ending.enter_context(tempfile.TemporaryDirectory()))
            write_page(self._folder / "page.html", done, config, live=True, progress=progress)
            self.pairs = self._write_pairs()
        except BaseException:
            self._ending.close()
            raise
        self._picture = lru_cache(_KEPT)(self._decode)

    def close(self) -> None:
        """Let go of the file of marks."""
        self._ending.close()

    def routes(self, token: str) -> list[Route]:
        """The addresses of the page, below the token."""
        from starlette.responses import FileResponse, JSONResponse
        from starlette.routing import Route

        def page(request: Request) -> Response:
            return FileResponse(self._folder / "page.html", headers=_POLICY)

        def copy(request: Request) -> Response:
            name = request.path_params["name"]
            path = self._folder / "page_files" / name
            if not re.fullmatch("[0-9a-f]{20}", name) or not path.is_file():
                return not_found()
            return FileResponse(path, media_type="image/webp")

        def original(request: Request) -> Response:
            number = request.path_params["number"]
            if not 0 <= number < len(self._done.ranking):
                return not_found()
            return picture_answer(lambda: self._picture(number))

        def read(request: Request) -> Response:
            return JSONResponse({"marks": self.marks.now})

        async def write(request: Request) -> Response:
            return await answer_change(request, token, _MOST_BYTES, self._take)

        return [
            Route("/{token}/", page),
            Route("/{token}/marks", read),
            Route("/{token}/marks", write, methods=["POST"]),
            Route("/{token}/page_files/{name}", copy),
            Route("/{token}/original/{number:int}", original),
        ]

    def _take(self, said: dict[str, Any]) -> dict[str, Any]:
        marks = said.get("marks")
        if not isinstance(marks, dict):
            raise BadRequestError("marks are missing")
        self.marks.take(marks)
        if any(isinstance(fields, dict) and "at" in fields for fields in marks.values()):
            with self._lock:
                self.pairs = self._write_pairs()
        return {"marks": self.marks.now}

    def _write_pairs(self) -> int:
        """Write the judged pairs, and say in the model's run where they are: the next training takes them."""
        pairs = write_pairs(self.pairs_file, self._works, self.marks.now, self._done.hashes)
        run = Run(self._done.model.checkpoint.parent)
        known, file = run.info.get("served", []), str(self.pairs_file.absolute())
        if pairs and file not in known and "dataset" in run.info:
            try:
                run.update(served=[*known, file])
            except (OSError, MiripError) as error:  # another's run: the pairs are kept all the same
                log.warning(
                    "%s; the next training takes these pairs only by --pairs %s", error, file
                )
        return pairs

    def _decode(self, number: int) -> bytes:
        name = self._done.ranking["file"].iloc[number]
        with self._decoding:
            return jpeg_picture(self._done.root / name, self._done.hashes[name], WHOLE)


def works_to_serve(source: str | None, checkpoint: Path | None) -> tuple[str | None, Path | None]:
    """What is to be ranked, and by which model: of a ranking that was written, a run, or works as they are.

    Args:
        source: folder or table of works, ``ranking.json`` or its folder, or a run.
        checkpoint: counts before what a ranking or run says.

    Raises:
        DataError: the run does not say what it learned from.
    """
    if source is None:
        return None, checkpoint
    path = Path(source)
    ranking = path if path.name == "ranking.json" else path / "ranking.json"
    if ranking.is_file():
        about = read_json(ranking)
        if {"folder", "checkpoint"} <= about.keys():
            return str(about["folder"]), checkpoint or Path(about["checkpoint"])
    if (path / RUN_FILE).is_file():
        works = Run(path).info.get("dataset")
        if works is None:
            raise DataError(
                f"{path} does not say what it learned from: give a folder of works, too"
            )
        return str(works), checkpoint or path
    return source, checkpoint
