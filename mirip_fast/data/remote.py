"""Files behind an address such as ``s3://bucket/folder``, through fsspec.

Inside the program an address is a path: ``s3://bucket/a.jpg`` is ``/s3:/bucket/a.jpg``, so that names,
folders and relative names work as for files; :func:`address` turns it back for people. No file system has
such a folder at its root, so wherever a path of this kind meets the disk it is simply not there.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from mirip_fast.data.image_files import SETTLED_NS, Stamp, one_line
from mirip_fast.errors import DataError
from mirip_fast.text import AS_PATH, address, nfc

#: What tells versions of a remote file apart, the best first; names differ between services.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "generation", "Content-MD5", "Digest")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created")
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp requests",
    "https": "aiohttp requests", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)", re.DOTALL)
_BLOCK_BYTES = 4 << 20  # read at once while a remote tar is looked through


def is_remote(path: Path) -> bool:
    """Whether a path stands for an address."""
    return AS_PATH.match(f"{path}/") is not None


def is_web(path: Path) -> bool:
    """Whether a path stands for an address on a web server."""
    return str(path).startswith(("/http:/", "/https:/"))


def located(source: Path | str) -> Path:
    """The path of a file, folder or address as a user wrote it; absolute.

    Raises:
        DataError: an address that carries a password or a signature, or one inside another.
    """
    text = str(source)
    if is_remote(Path(text)):
        return Path(text)
    if re.match(r"\w+::", text) and not os.path.lexists(text):
        raise DataError(f"{text}: addresses inside addresses (::) cannot be read; give a plain one")
    match = _ADDRESS.fullmatch(text)
    if match is None or os.path.lexists(text):
        return _as_on_disk(Path(os.path.abspath(Path(text).expanduser())))  # noqa: PTH100 (links stay)
    scheme, rest = match[1].lower(), match[2]
    if scheme in ("file", "local"):
        return Path("/", rest)
    if scheme in ("http", "https") and "?" in rest:
        raise DataError(
            f"{text.partition('?')[0]}?…: what follows ? is often a signature, which would be kept in the "
            "cache. Give an address without it, or download the file"
        )
    if "@" in rest.partition("/")[0]:
        raise DataError(
            f"{scheme}://…: the address has a user or a password in it, which would be kept in the cache. "
            "Give credentials in the environment or in ~/.config/fsspec/conf.json"
        )
    path = Path(f"/{scheme}:", rest.strip("/"))
    if ".." in path.parts:
        raise DataError(f"{text}: .. leads nowhere in an address; write it out")
    return path


def _as_on_disk(path: Path) -> Path:
    """A path with each part as the disk spells it, where only Unicode composition differs."""
    if str(path).isascii() or os.path.exists(path):  # noqa: PTH110 - a list of tars is longer than names may be
        return path
    found = Path(path.anchor)
    for name in path.parts[1:]:
        part = name
        if not os.path.exists(found / name):  # noqa: PTH110
            try:
                part = next(n for n in os.listdir(found) if nfc(n) == nfc(name))  # noqa: PTH208
            except (OSError, StopIteration):
                return path
        found /= part
    return found


#: What a service says of a file: its size in bytes, and what it is remembered by; None: unknown.
_Said = tuple[int | None, Stamp | None]
_files: dict[str, _Said] = {}  # so that it is not asked for again


def file_info(path: Path) -> _Said | None:
    """Size in bytes and stamp of a remote file, where known, asked for once; None if there is no file.

    Raises:
        DataError: the service cannot be reached or refuses.
    """
    if (known := _files.get(str(path))) is not None:
        return known
    with _telling(path):
        fs, name = _open_service(path)
        try:
            info = fs.info(name)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, DataError):  # not missing, but refused
                raise error.__cause__ from None
            return None
    return None if info.get("type") == "directory" else _noted(path, info)


def listing(folder: Path, *, deep: bool) -> Iterator[tuple[str, bool]]:
    """Name below ``folder`` of each file and folder in it, and whether it is a file.

    Args:
        folder: an address; nothing is listed where there is no such folder.
        deep: files in its folders instead of these, at any depth.

    Raises:
        DataError: the service cannot be reached or refuses.
    """
    with _telling(folder):
        fs, root = _open_service(folder)
        try:
            if deep:
                found = fs.find(root, detail=True)
            else:
                found = {info["name"]: info for info in fs.ls(root, detail=True)}
        except (FileNotFoundError, NotADirectoryError):
            return
    top = root.strip("/") + "/"
    for name, info in found.items():
        below = str(name).lstrip("/").removeprefix(top)
        if is_web(folder) and not set(unquote(below)) & set("%?#"):
            below = unquote(below)  # as tables spell it; when it is asked for, it is quoted again
        if str(name).lstrip("/").startswith(top):
            below, is_file = below.rstrip("/"), info.get("type") != "directory"
            if is_file:
                _noted(folder / below, info)
            yield below, is_file


def matching(pattern: Path) -> list[Path]:
    """The addresses that match a pattern with ``*``, sorted.

    Raises:
        DataError: the service cannot be reached or refuses; or it is a web server.
    """
    if is_web(pattern):
        raise DataError(
            f"{address(pattern)}: web servers do not list their files in one way, so * does not work there; "
            "name them one by one, or, in a shell, as {000..127} without quotes"
        )
    with _telling(pattern):
        fs, name = _open_service(pattern)
        scheme = address(pattern).partition("://")[0]
        names = sorted(str(found) for found in fs.glob(name))
    return [located(n if "://" in n else f"{scheme}://{n.lstrip('/')}") for n in names]


def read_bytes(path: Path, start: int, size: int) -> bytes:
    """``size`` bytes of a remote file from ``start`` on; fewer where it ends.

    Raises:
        DataError: it cannot be read, or the service gives whole files only.
    """
    with _telling(path):
        fs, name = _open_service(path)
        data: bytes = fs.cat_file(name, start=start, end=start + size)
    if len(data) > size:
        raise _gives_no_parts(path)
    return data


@contextmanager
def open_remote(path: Path) -> Iterator[IO[bytes]]:
    """A remote file to seek in.

    Raises:
        DataError: it is not there, cannot be read, or the service gives whole files only.
    """
    with _telling(path):
        fs, name = _open_service(path)
        with fs.open(name, "rb", block_size=_BLOCK_BYTES, cache_type="readahead") as stream:
            if not stream.seekable():
                raise _gives_no_parts(path)
            yield stream


def _gives_no_parts(path: Path) -> DataError:
    return DataError(
        f"{address(path)}: the server does not give parts of a file; download it and give the copy"
    )


def _open_service(path: Path) -> tuple[Any, str]:
    """fsspec's file system for an address, and its own spelling of it."""
    from fsspec.core import url_to_fs

    url = address(path)
    try:
        fs, name = url_to_fs(url, **({"get_client": _web_client} if is_web(path) else {}))
    except ImportError as error:
        packages = _PACKAGES.get(url.partition("://")[0])
        what = f"pip install {packages}" if packages else one_line(str(error))
        raise DataError(f"{url}: a package for such addresses is missing: {what}") from error
    except ValueError as error:
        raise DataError(
            f"{url}: {one_line(str(error))}. Addresses begin with s3://, gs://, hf://, https:// or another "
            "name that fsspec knows"
        ) from error
    return fs, str(name)


async def _web_client(**settings: Any) -> Any:
    """A session that a server cannot send elsewhere: what it says lies there might be a service inside."""
    import aiohttp
    from yarl import URL

    async def refuse_elsewhere(_session: Any, _context: Any, step: Any) -> None:
        to = step.response.headers.get("Location") or ""
        there = step.url.join(URL(to))
        safer = (step.url.scheme, there.scheme, there.port) == ("http", "https", 443)
        if there.host != step.url.host or (there.origin() != step.url.origin() and not safer):
            raise DataError(
                f"{step.url}: the server sends on to another place, {one_line(to, 100)}, which is not read. "
                "Give that address if you mean it, or download the file"
            )

    session = aiohttp.TraceConfig()
    session.on_request_redirect.append(refuse_elsewhere)
    return aiohttp.ClientSession(**settings, trace_configs=[session])


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn whatever a service raises into one line that names the address."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(f"{address(path)}: there is no such file") from error
    except Exception as error:  # each service has errors of its own
        name = type(error).__name__
        text = one_line(str(error)) or name
        hint = ""
        if re.search(
            "credential|permission|forbidden|denied|unauthor|401|403", f"{name} {text}", re.I
        ):
            hint = ". Credentials are looked for where the service's own tools keep them"
        raise DataError(f"{address(path)}: cannot be read ({name}: {text}){hint}") from error


def _noted(path: Path, info: dict[str, Any]) -> _Said:
    size = info.get("size")
    size = size if isinstance(size, int) else None
    mark: object = next((info[key] for key in _VERSIONS if info.get(key)), None)
    if mark is None:
        seconds = next((_seconds(info[key]) for key in _TIMES if info.get(key)), 0.0)
        if 0 < seconds < time.time() - SETTLED_NS / 1e9:
            mark = seconds  # listings and single answers spell times differently
    if mark is None or size is None:  # some listings tell names only
        return size, None
    found = _files[str(path)] = size, (size, mark_of(mark))
    return found


def mark_of(*what: object) -> int:
    """A number below 2**63 that stands for a version, in a stamp's second place."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big") >> 1


def _seconds(moment: object) -> float:
    """A time in any of the spellings in use, in seconds since 1970; 0 where it makes no sense."""
    if isinstance(moment, int | float):
        return float(moment)
    if isinstance(moment, datetime):
        return moment.timestamp()
    from email.utils import parsedate_to_datetime

    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError):
            return read(str(moment)).timestamp()
    return 0.0
