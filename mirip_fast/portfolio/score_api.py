"""Scores of uploaded pictures over HTTP: one model held in memory, a bounded queue before it.

A picture from a stranger is decoded in a process that no file can harm, and neither it nor its features are
kept on the disk, unless a folder for uploads is named.
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast import __version__
from mirip_fast.config import Config
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.formats import SAY_WHICH
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.engine import Forward, Speed
from mirip_fast.features.phase_one import default_workers
from mirip_fast.features.recipe import sizes_of, wanted_series
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import temporary_folder, write_bytes
from mirip_fast.portfolio.rank import DRAWS
from mirip_fast.portfolio.ranking import CONFIDENCE
from mirip_fast.ranking.held_out import load_calibration
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.ranking.scorer import phase_of_model
from mirip_fast.runtime import Closing
from mirip_fast.serving import BadRequestError, sent_bytes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

log = logging.getLogger(__name__)

PUBLIC = ("/health", "/openapi.json", "/docs")
MOST_PICTURES = 32  # in one request
_SCORING = 2  # requests at a time: one is decoded while the other passes through the backbone


class Scorer(Closing):
    """Scores pictures that are given as bytes, as `rank` would score their files.

    Args:
        model: looks through one backbone.
        config: device, cache folder (of the backbone's checksums), workers and largest picture.
        backbone: another place of the model's backbone, if it moved.
        keep: folder that uploads are kept in, under their SHA-256; None keeps none.

    Raises:
        BackboneError: the backbone cannot be found.
        CheckpointError: it is not the model's, or the model has several.
    """

    def __init__(
        self,
        model: ScoreModel,
        config: Config,
        *,
        backbone: str | None = None,
        keep: Path | None = None,
    ):
        model.require_one_backbone("serve")
        self.model, self._keep = model, keep
        cache_dir = Path(config.embed.cache_dir)
        with open_hashes(cache_dir) as hashes:
            phase = phase_of_model(model.info, cache_dir, config.runtime.device, backbone, hashes)
        self._recipe = phase.recipe
        self._need = tuple(wanted_series(phase.recipe))
        self._forward = Forward(phase.load(), phase.recipe, config.embed.embed_batch_size, Speed())
        self._max_pixels = round(config.embed.max_megapixels * 1e6)
        self.calibration = load_calibration(model)
        self._ending = ExitStack()
        self._folder = self._ending.enter_context(temporary_folder())
        self._pool = DecodePool(max(1, default_workers(config.embed.workers)))
        self._ending.callback(self._pool.close)
        self._count = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the decoding processes."""
        self._ending.close()

    def score(self, pictures: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """Score pictures: one result each, in order.

        Args:
            pictures: name and content of each.

        Returns:
            ``file`` and ``sha256`` of each, with ``error`` where it cannot be read; else ``score`` (higher is
            better) and, as far as they are known, ``score_low`` and ``score_high`` (95 % interval of the
            grade), ``score_100`` with its own two, ``tier`` and ``tiers`` (name → probability).
        """
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
            for _, content in pictures:
                kept = self._keep / hashlib.sha256(content).hexdigest()
                write_bytes(kept, content)
        decoded = self._decode([content for _, content in pictures])
        results: list[dict[str, Any]] = [
            {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in pictures
        ]
        squares: dict[bytes, tuple[NDArray[np.uint8], ...]] = {}
        for result, found in zip(results, decoded, strict=True):
            if isinstance(found, str):
                result["error"] = found
            else:
                squares[bytes.fromhex(result["sha256"])] = found
        if squares:
            known = self._known(squares)
            for result in results:
                result.update(known.get(bytes.fromhex(result["sha256"]), {}))
        return results

    def _decode(self, contents: Sequence[bytes]) -> list[tuple[NDArray[np.uint8], ...] | str]:
        with self._lock:
            first = self._count
            self._count += len(contents)
        files = [self._folder / str(first + i) for i in range(len(contents))]
        try:
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            sizes = sizes_of(self._need)
            jobs = [
                DecodeJob(
                    i, file, sizes, self._recipe.resize, self._recipe.decode == "fast",
                    max_pixels=self._max_pixels,
                )
                for i, file in enumerate(files)
            ]  # fmt: skip
            found = [done.reason or done.images for done in self._pool.decode(jobs)]
            one = "; one page is a work: send each as a PDF or a picture of its own"
            return [f.replace(SAY_WHICH, one) if isinstance(f, str) else f for f in found]
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    def _known(
        self, squares: dict[bytes, tuple[NDArray[np.uint8], ...]]
    ) -> dict[bytes, dict[str, Any]]:
        hashes = list(squares)
        rows: dict[SeriesSpec, list[NDArray[Any]]] = {spec: [] for _, _, spec in self._need}
        for _, wait in self._forward.run((self._need, hashes, list(squares.values()))):
            for spec, found in wait().items():
                rows[spec].append(found)
        store = _InMemory(hashes, {spec: np.concatenate(parts) for spec, parts in rows.items()})
        scores = self.model.score(store, hashes)
        columns: dict[str, Any] = {"score": scores.astype(float)}
        # Each by itself: what a picture is answered does not depend on what is sent with it.
        drawn = [
            self.model.draw(store, [h], scores[i : i + 1], DRAWS) for i, h in enumerate(hashes)
        ]
        alone = [one for one in drawn if one is not None]
        if alone:
            draws = np.concatenate(alone, axis=1)
            ends = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
            columns["score_low"], columns["score_high"] = ends
        for name in list(columns):
            percentiles = self.calibration.score_100(columns[name])
            if percentiles is not None:
                columns[name.replace("score", "score_100")] = percentiles
        chances = self.calibration.tier_probabilities(scores)
        tiers = self.calibration.tier_names
        results = {}
        for i, sha in enumerate(hashes):
            result: dict[str, Any] = {
                name: round(float(values[i]), 4) for name, values in columns.items()
            }
            if chances is not None:
                result["tier"] = tiers[int(chances[i].argmax())]
                result["tiers"] = dict(zip(tiers, chances[i].round(4).tolist(), strict=True))
            results[sha] = result
        return results


class _InMemory(FeatureStore):
    """Features of a few pictures, where a model looks for those of a store."""

    def __init__(self, hashes: Sequence[bytes], rows: dict[SeriesSpec, NDArray[Any]]):
        super().__init__(Path("uploads"), {})
        self._place = {sha: i for i, sha in enumerate(hashes)}
        self._specs = {spec.name: spec for spec in rows}
        self._held = {spec.name: values for spec, values in rows.items()}

    def series(self) -> dict[str, SeriesSpec]:
        return self._specs

    def rows(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        return np.array([self._place[sha] for sha in hashes], np.int64)

    def read(self, series: str, rows: NDArray[np.int64], *, finite: bool = True) -> NDArray[Any]:
        return self._held[series][rows]


def routes(scorer: Scorer, *, most_bytes: int, queue: int) -> list[Route]:
    """The addresses of the API.

    Args:
        scorer: scores.
        most_bytes: of one request's body; larger ones are answered with 413.
        queue: requests that may wait; further ones are answered with 503.
    """
    import anyio
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    waiting = 0
    slots = anyio.Semaphore(_SCORING)
    about = openapi(most_bytes)

    async def score(request: Request) -> Response:
        nonlocal waiting
        if int(request.headers.get("content-length", "0") or 0) > most_bytes:
            return _refused(413, f"a request may have {most_bytes} bytes")
        if waiting >= queue:
            return _refused(503, f"{queue} requests are waiting: try again", {"Retry-After": "1"})
        waiting += 1
        try:
            pictures = await _pictures(request, most_bytes)
            async with slots:
                works = await run_in_threadpool(scorer.score, pictures)
        except BadRequestError as error:
            return _refused(413 if str(error) == "too long" else 400, str(error))
        finally:
            waiting -= 1
        known = scorer.calibration
        answer = {
            "model": scorer.model.checkpoint.parent.name,
            "confidence": CONFIDENCE,
            "works": works,
            "warnings": ([known.chance] if known.chance else []) + known.warnings(),
        }
        return JSONResponse(answer, 422 if all("error" in work for work in works) else 200)

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__, "waiting": waiting})

    return [
        Route("/score", score, methods=["POST"]),
        Route("/health", health),
        Route("/openapi.json", lambda request: JSONResponse(about)),
        Route("/docs", lambda request: HTMLResponse(_page_of(about))),
    ]


def _refused(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": why}, status, headers=headers)


async def _pictures(request: Request, most_bytes: int) -> list[tuple[str, bytes]]:
    """Name and content of the pictures of a request: of a form's files, or the body as it is."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    body = await sent_bytes(request, most_bytes)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        if not body:
            raise BadRequestError("no picture: send one as the body, or files of a form")
        return [(request.query_params.get("name", ""), body)]

    async def stream() -> Any:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=MOST_PICTURES, max_fields=16)
    parser.spool_max_size = most_bytes + 1  # so that nothing goes to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise BadRequestError(str(error) or "no form that can be read") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    pictures = [(os.path.basename(file.filename or ""), await file.read()) for file in files]  # noqa: PTH119
    if not pictures:
        raise BadRequestError("no picture: the form has no files")
    return pictures


def openapi(most_bytes: int) -> dict[str, Any]:
    """The description of the API, as OpenAPI 3.1."""
    number, text = {"type": "number"}, {"type": "string"}
    binary = {"type": "string", "format": "binary"}
    work = {
        "type": "object",
        "required": ["file", "sha256"],
        "properties": {
            "file": {**text, "description": "name that was sent"},
            "sha256": {**text, "description": "of the content"},
            "error": {**text, "description": "why it cannot be read; nothing else is there then"},
            "score": {**number, "description": "higher is better"},
            "score_low": {**number, "description": "95 % interval of the grade, where it is known"},
            "score_high": number,
            "score_100": {
                **number,
                "description": "of 100 graded works that the model had not trained on, how many score lower",
            },
            "score_100_low": number,
            "score_100_high": number,
            "tier": {**text, "description": "the most probable grade"},
            "tiers": {"type": "object", "additionalProperties": number, "description": "grade → probability"},
        },
    }  # fmt: skip
    answer = {
        "type": "object",
        "properties": {
            "model": text,
            "confidence": number,
            "works": {"type": "array", "items": {"$ref": "#/components/schemas/Work"}},
            "warnings": {"type": "array", "items": text},
        },
    }
    files = {
        "type": "object",
        "properties": {"files": {"type": "array", "maxItems": MOST_PICTURES, "items": binary}},
    }

    def said(description: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    error = {"type": "object", "properties": {"error": text}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mirip-fast", "version": __version__},
        "security": [{"token": []}],
        "paths": {
            "/score": {
                "post": {
                    "summary": f"Score one picture (the body) or up to {MOST_PICTURES} (files of a form)",
                    "description": f"A request may have {most_bytes} bytes. Nothing that is sent is kept, "
                    "unless the server was started with --keep.",
                    "requestBody": {
                        "required": True,
                        "content": {
                            "image/*": {"schema": binary},
                            "multipart/form-data": {"schema": files},
                        },
                    },
                    "responses": {
                        "200": said("Scores, in the order that was sent", answer),
                        "400": said("No picture, or no form that can be read", error),
                        "404": {"description": "The token is missing or wrong"},
                        "413": said("Too large", error),
                        "422": said("None of the pictures can be read", answer),
                        "503": said("Too many requests are waiting; see Retry-After", error),
                    },
                }
            },
            "/health": {
                "get": {
                    "summary": "Whether the server answers, and how many requests wait",
                    "security": [],
                    "responses": {"200": said("It does", {"type": "object"})},
                }
            },
        },
        "components": {
            "schemas": {"Work": work},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _page_of(about: dict[str, Any]) -> str:
    """The description for people, as HTML without style and script."""
    parts = []
    for path, methods in about["paths"].items():
        for method, what in methods.items():
            answers = "".join(
                f"<dt>{status}</dt><dd>{html.escape(answer['description'])}</dd>"
                for status, answer in what["responses"].items()
            )
            parts.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(what['summary'])}. "
                f"{html.escape(what.get('description', ''))}</p><dl>{answers}</dl>"
            )
    fields = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(field.get('description', field['type']))}</dd>"
        for name, field in about["components"]["schemas"]["Work"]["properties"].items()
    )
    example = (
        'curl -H "Authorization: Bearer TOKEN" -F files=@a.jpg -F files=@b.jpg http://localhost:PORT/score\n'
        'curl -H "Authorization: Bearer TOKEN" --data-binary @a.jpg "http://localhost:PORT/score?name=a.jpg"'
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        "<title>mirip-fast: scores over HTTP</title>"
        f"<h1>mirip-fast {html.escape(about['info']['version'])}: scores over HTTP</h1><pre>{example}</pre>"
        f"{''.join(parts)}<h2>A work in the answer</h2><dl>{fields}</dl>"
        '<p><a href="openapi.json">openapi.json</a></p></html>'
    )
