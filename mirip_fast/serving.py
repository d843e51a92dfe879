"""Local servers of pages: for this machine alone, unless more is asked for.

A server listens on 127.0.0.1. Every address holds a random token, or the request brings it in a header;
whoever does not know it gets 404. Requests that name another host are refused, so that no foreign page
reaches it through a name that resolves to 127.0.0.1 (DNS rebinding), and what changes something needs the
token in a header, which no foreign page can send.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from PIL import Image

from mirip_fast.data.decode_pool import DecodePool, picture_job
from mirip_fast.errors import ConfigError, ImageError, MiripError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
TOKEN_HEADER = "x-mirip-token"
STALE = 409  # what a request is about is not there any more (a second tab, a key pressed twice)
_QUALITY = 90  # of JPEG
HEADERS = {
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


def require_packages(command: str, *more: str) -> None:
    """See before any work is done that the page can be served.

    Args:
        command: what needs them.
        more: packages that it needs besides.

    Raises:
        ConfigError: the packages are not installed; says what to type.
    """
    for package in ("starlette", "uvicorn", *more):
        if find_spec(package.replace("-", "_")) is None:
            raise ConfigError(
                f"`mirip-fast {command}` needs the package {package}: pip install "
                f"{' '.join(('starlette', 'uvicorn', *more))}"
            )


class LocalServer:
    """Serves an application until it is stopped.

    Args:
        make_app: token → the application, behind a :class:`Guard`.
        port: where to listen; 0 takes a free one.
        host: address to listen on.
        token: None makes one.
        name: of this machine in the address.

    Attributes:
        address: of the page, token included.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(
        self,
        make_app: Callable[[str], Starlette],
        port: int = 0,
        *,
        host: str = HOST,
        token: str | None = None,
        name: str = HOST,
    ):
        import uvicorn

        self.token = token or secrets.token_urlsafe(24)
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://{name}:{self.port}/{self.token}/"
        numbers = (signal.SIGINT, signal.SIGTERM)
        ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]

        class Server(uvicorn.Server):
            """A signal that whoever started this process has it ignore does not end it."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if sig not in ignored:
                    super().handle_exit(sig, frame)

        self._server = Server(
            uvicorn.Config(
                make_app(self.token), log_level="warning", access_log=False,
                lifespan="off", ws="none", server_header=False, timeout_graceful_shutdown=2,
            )
        )  # fmt: skip

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


class Guard:
    """Lets only requests for this server by name, with the token, reach the application.

    Args:
        app: the application.
        token: stands in the address, or in the header ``Authorization: Bearer …``; one of several.
        names: hosts that may be asked for.
        public: addresses that need no token.
    """

    def __init__(
        self,
        app: Any,
        token: str | Collection[str],
        names: Collection[str] = (),
        public: Collection[str] = (),
    ):
        tokens = [token] if isinstance(token, str) else token
        self._app, self._tokens = app, [one.encode() for one in tokens]
        self._names, self._public = (HOST, "localhost", *names), public

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import Response

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        # "OPTIONS *", "CONNECT host" and other nonsense have no slash.
        path = scope["path"]
        given = path.partition("/")[2].partition("/")[0].encode("utf-8", "surrogateescape")
        bearer = headers.get("authorization", "").removeprefix("Bearer ").encode()
        known = [secrets.compare_digest(a, b) for a in (given, bearer) for b in self._tokens]
        refusal: Response | None = None
        names = self._names
        if not _is_ours(headers.get("host", ""), names) or not _is_own(
            headers.get("origin"), names
        ):
            said = "Not by this name: open the address that stands in the terminal"
            refusal = Response(said, 421, media_type="text/plain")
        elif not any(known) and path not in self._public:
            refusal = not_found()
        await (refusal or self._app)(scope, receive, send_guarded)


class BadRequestError(ValueError):
    """What was sent makes no sense, or not any more.

    Args:
        message: says why.
        status: of the answer.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


async def answer_change(
    request: Request, token: str, most: int, change: Callable[[dict[str, Any]], Any]
) -> Response:
    """Do what a page asks for, and answer with what it is to show.

    Args:
        request: its JSON object, which has the token in a header: no foreign page can send that.
        token: that it must have.
        most: bytes.
        change: takes the object, in another thread; gives plain JSON types.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    if not secrets.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), token.encode()):
        return JSONResponse({"error": "the token is missing"}, 403)
    try:
        said = await sent_json(request, most)
        return JSONResponse(await run_in_threadpool(change, said))
    except BadRequestError as error:
        return JSONResponse({"error": str(error)}, error.status)
    except (MiripError, OSError) as error:  # the user is told on the page
        log.error("Not saved: %s", error)
        return JSONResponse({"error": str(error)}, 500)


def not_found(why: str = "Not found") -> Response:
    """There is nothing at an address."""
    from starlette.responses import Response

    return Response(why, 404, media_type="text/plain")


def picture_answer(picture: Callable[[], bytes]) -> Response:
    """A JPEG file, which a browser may keep: its address holds the token; or why there is none."""
    from starlette.responses import Response

    try:
        data = picture()
    except ImageError as error:
        return not_found(str(error))
    kept = {"Cache-Control": "private, max-age=3600"}
    return Response(data, media_type="image/jpeg", headers=kept)


def network_addresses() -> list[str]:
    """IPv4 addresses of this machine on the network, the one that leads out first.

    Raises:
        ConfigError: it has none.
    """
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect(("192.0.2.1", 9))  # nothing is sent: it only says which way that would go
        found.append(out.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    found = [address for address in dict.fromkeys(found) if not address.startswith(("127.", "0."))]
    if not found:
        raise ConfigError(
            "--share: this machine is on no network; without it the page is for this machine"
        )
    return found


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # a browser may ask from now on; it is answered when the server runs
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--port {port} cannot be listened on ({error.strerror}); without --port a free one is taken"
        ) from error
    return listening


def _is_ours(host: str, names: Collection[str]) -> bool:
    """Whether a Host header has one of this server's names, on whatever port (a tunnel may lead here)."""
    name, _, port = host.partition(":")
    return name.lower() in names and (port == "" or port.isdecimal())


def _is_own(origin: str | None, names: Collection[str]) -> bool:
    """Whether a request comes from this page, as far as the browser says."""
    if origin is None:
        return True
    scheme, _, host = origin.partition("://")
    if scheme == "https":  # of a proxy before it; never of this machine itself
        names = [name for name in names if name not in (HOST, "localhost")]
    return scheme in ("http", "https") and _is_ours(host, names)


async def sent_bytes(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        BadRequestError: it has more than ``most`` bytes.
    """
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise BadRequestError("too long")
    return bytes(data)


async def sent_json(request: Request, most: int) -> dict[str, Any]:
    """The JSON object that is the body of a request.

    Raises:
        BadRequestError: it is none, or has more than ``most`` bytes.
    """
    data = await sent_bytes(request, most)
    try:
        said = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadRequestError("no JSON") from error
    if not isinstance(said, dict):
        raise BadRequestError("no JSON object")
    return said


def jpeg_picture(path: Path, sha256: bytes, side: int) -> bytes:
    """A picture as the browser gets it: decoded, made small, written anew. No byte of its file reaches it.

    The file must still hold the bytes that it had: whatever has been put in its place since, be it a link to
    somewhere else, is not shown.

    Args:
        path: the file.
        sha256: of its content.
        side: longest side in pixels.

    Raises:
        ImageError: it cannot be read, or is another by now.
    """

    def choose(found: bytes) -> tuple[int, ...]:
        return (side,) if found == sha256 else ()  # anything else is not even decoded

    with DecodePool(1) as pool:
        (done,) = pool.decode([picture_job(0, path, side, ask=True)], choose)
    if done.reason is not None:
        raise ImageError(done.reason)
    if done.sha256 != sha256:
        raise ImageError("its file was changed since; start again")
    out = io.BytesIO()
    Image.fromarray(done.images[0]).save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
