"""The local server of the page: for this machine and this session alone.

It listens on 127.0.0.1 only. Every address holds a random token; whoever does not know it gets 404. Requests
that name another host are refused, so that no foreign page reaches it through a name that resolves to
127.0.0.1 (DNS rebinding), and what changes something needs the token in a header, which no foreign page can
send.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mirip_fast.errors import ConfigError, ImageError, MiripError
from mirip_fast.label.pictures import Pictures
from mirip_fast.label.session import Session, StalePairError

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
TOKEN_HEADER = "x-label-token"
_NAMES = (HOST, "localhost")
_PAGE = Path(__file__).with_name("page")
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "label.css": ("label.css", "text/css; charset=utf-8"),
    "label.js": ("label.js", "text/javascript; charset=utf-8"),
    "words.js": ("words.js", "text/javascript; charset=utf-8"),
}
_MOST_BYTES = 4096  # of what a page sends
_MOST_DIGITS = 10  # of a picture's number
_HEADERS = {
    "Content-Security-Policy": (  # data: is the page's empty icon
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def require_packages() -> None:
    """See before any work is done that the page can be served.

    Raises:
        ConfigError: the packages are not installed; says what to type.
    """
    try:
        import starlette
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`mirip-fast label` needs the package {error.name}: pip install 'mirip-fast[label]'"
        ) from error
    del starlette


class LabelServer:
    """Serves one session until it is stopped.

    Args:
        session: takes the verdicts.
        pictures: of the works.
        port: where to listen; 0 takes a free one.

    Attributes:
        address: of the page, token included.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, session: Session, pictures: Pictures, port: int = 0):
        self.token = secrets.token_urlsafe(24)
        self._socket = _listen(port)
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://{HOST}:{self.port}/{self.token}/"
        self._server = _server(make_app(session, pictures, self.token))

    def run(self) -> None:
        """Serve until Ctrl-C, SIGTERM or :meth:`stop`."""
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            pass  # the way to end it
        finally:
            self._socket.close()

    def stop(self) -> None:
        """End :meth:`run`, from another thread."""
        self._server.should_exit = True


def _server(app: Starlette) -> uvicorn.Server:
    import uvicorn

    numbers = (signal.SIGINT, signal.SIGTERM)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]

    class Server(uvicorn.Server):
        """A signal that whoever started this process has it ignore does not end it."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if sig not in ignored:
                super().handle_exit(sig, frame)

    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )


def make_app(session: Session, pictures: Pictures, token: str) -> Starlette:
    """The web application: the page, its pictures, and what it can do.

    Args:
        session: takes the verdicts.
        pictures: of the works.
        token: that every address holds.
    """
    from starlette.applications import Starlette
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
            data = pictures.jpeg(int(number))
        except ImageError as error:
            return Response(str(error), 404, media_type="text/plain; charset=utf-8")
        # The address holds the session's token: no other session sees what a browser has kept.
        kept = {"Cache-Control": "private, max-age=3600"}
        return Response(data, media_type="image/jpeg", headers=kept)

    def state(request: Request) -> Response:
        return JSONResponse(session.state())

    def judge(said: dict[str, Any]) -> None:
        session.judge(
            _whole(said, "number"), _whole(said, "label", (-1, 0, 1)), _seconds(said.get("seconds"))
        )

    def skip(said: dict[str, Any]) -> None:
        session.skip(_whole(said, "number"))

    def undo(said: dict[str, Any]) -> None:
        session.take_back()

    def post(
        act: Callable[[dict[str, Any]], None],
    ) -> Callable[[Request], Awaitable[Response]]:
        from starlette.concurrency import run_in_threadpool

        async def answer(request: Request) -> Response:
            if not secrets.compare_digest(
                request.headers.get(TOKEN_HEADER, "").encode(), token.encode()
            ):
                return JSONResponse({"error": "the token is missing"}, 403)
            try:
                said = _parse(await _body(request))
                await run_in_threadpool(act, said)
                return JSONResponse(await run_in_threadpool(session.state))
            except StalePairError as error:
                return JSONResponse({"error": str(error)}, 409)
            except _BadRequest as error:
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
        Route("/{token}/skip", post(skip), methods=["POST"]),
        Route("/{token}/undo", post(undo), methods=["POST"]),
        Route("/{token}/{name}", page),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, token=token)])


class _Guard:
    """Lets only requests for this machine by name, with the token in the address, reach the application."""

    def __init__(self, app: Any, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import Response

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        # "OPTIONS *", "CONNECT host" and other nonsense have no slash.
        given = scope["path"].partition("/")[2].partition("/")[0].encode("utf-8", "surrogateescape")
        refusal: Response | None = None
        if not _is_local(headers.get("host", "")) or not _is_own(headers.get("origin")):
            refusal = Response("This page is for this machine only", 421, media_type="text/plain")
        elif not secrets.compare_digest(given, self._token):
            refusal = Response("Not found", 404, media_type="text/plain")
        await (refusal or self._app)(scope, receive, send_guarded)


class _BadRequest(ValueError):
    """What was sent makes no sense."""


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(128)  # a browser may ask from now on; it is answered when the server runs
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--port {port} can not be listened on ({error.strerror}); without --port a free one is taken"
        ) from error
    return listening


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine, on whatever port (a tunnel may lead here)."""
    name, _, port = host.partition(":")
    return name.lower() in _NAMES and (port == "" or port.isdecimal())


def _is_own(origin: str | None) -> bool:
    """Whether a request comes from this page, as far as the browser says."""
    if origin is None:
        return True
    scheme, _, host = origin.partition("://")
    return scheme == "http" and _is_local(host)


async def _body(request: Request) -> bytes:
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _MOST_BYTES:
            raise _BadRequest("too long")
    return data


def _parse(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise _BadRequest("no JSON") from error
    if not isinstance(said, dict):
        raise _BadRequest("no JSON object")
    return said


def _whole(said: dict[str, Any], key: str, allowed: tuple[int, ...] | None = None) -> int:
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed and value not in allowed):
        raise _BadRequest(f"{key} is missing or wrong")
    return value


def _seconds(value: object) -> float:
    """The time a judge took, in seconds; 0 where the page says nothing sensible."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return 0.0
