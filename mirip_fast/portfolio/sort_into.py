"""Files of a ranking in folders by tier: copied, linked or moved, and put back again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.data.formats import split_page
from mirip_fast.data.sources import piece_of
from mirip_fast.data.spreadsheets import header_text
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import disk_full, fsync_folder, is_disk_full, sha256_of
from mirip_fast.text import closest, counted, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

    from mirip_fast.portfolio.rank import RankDone

LOG_NAME = "sorted.jsonl"

_NO_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # what Windows takes in no name
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def plan(done: RankDone, into: Path, by: str = "tier", how: str = "copy") -> pd.DataFrame:
    """Where each work of a ranking goes. Nothing is written.

    Args:
        done: the ranking.
        into: the folder; made if missing.
        by: a column, whose values name the folders; ``rank`` numbers the files instead.
        how: copy, link (symbolic) or move.

    Returns:
        A row per work, the best first: its ``file``, the ``folder`` below ``into``, the ``target``, and
        whether the file is ``there`` already from an earlier time.

    Raises:
        DataError: there is no such column, ``into`` cannot be it, or works lie in tars, at addresses or in
            PDF files and are to be linked or moved.
    """
    import pandas as pd

    columns = [str(column) for column in done.ranking.columns]
    if by not in columns:
        close = closest(by, columns)
        hint = f" Did you mean {close!r}?" if close else f" There are: {header_text(columns)}"
        why = " (the model knows no tiers)" if by == "tier" else ""
        raise DataError(f"--sort-by {by}: no such column{why}.{hint}")
    into, root = Path(os.path.abspath(into.expanduser())), Path(os.path.realpath(done.root))  # noqa: PTH100
    if into.exists() and not into.is_dir():
        raise DataError(f"--sort-into {into}: a file, not a folder")
    if how != "move" and Path(os.path.realpath(into)).is_relative_to(root) and done.source.is_dir():
        raise DataError(
            f"--sort-into {shown(into)} lies in the folder that is ranked, which would then have every work "
            "twice; name a folder elsewhere, or move the files with --sort-how move"
        )
    rows, inside = [], 0
    taken: dict[Path, set[str]] = {}
    width = len(str(len(done.ranking)))
    names = zip(done.ranking["file"], done.ranking[by], strict=True)
    for number, (name, value) in enumerate(names, start=1):
        file = done.root / name
        inside += not file.is_file()
        unknown = value is None or value != value or not str(value).strip()  # noqa: PLR0124 (NaN)
        folder = "" if by == "rank" else _name("unknown" if unknown else str(value))
        whole, page = split_page(file.name)
        own = (
            f"{whole[:-4]} ({page[1:].replace('=', ' ')}).pdf" if page else whole
        )  # still all its pages
        wanted = (f"{number:0{width}d} " if by == "rank" else "") + _name(own)
        place = into / folder
        used = taken.setdefault(place, {nfc(n).casefold() for n in _names_in(place)})
        target, copy = place / wanted, 1
        sha = done.hashes.get(name)
        while _key(target) in used and not _is_copy(target, file, sha, how):
            copy += 1
            target = place / f"{Path(wanted).stem} ({copy}){Path(wanted).suffix}"
        rows.append((file, folder, target, _key(target) in used))
        used.add(_key(target))
    if inside and how != "copy":
        raise DataError(
            f"--sort-how {how}: {counted(inside, 'work')} {'lies' if inside == 1 else 'lie'} in a tar or PDF "
            "file or at an address; these can be copied only: --sort-how copy"
        )
    return pd.DataFrame(rows, columns=["file", "folder", "target", "there"]).astype({"there": bool})


def sort_files(
    into: Path,
    how: str,
    acts: Sequence[tuple[Path, Path]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Path, str]]:
    """Copy, link or move files; each act stands in the log in ``into``, on the disk, before it is done.

    Args:
        into: the folder, with the log that :func:`undo` reads.
        how: copy, link or move.
        acts: (file, where to), see :func:`plan`.
        progress: called with files done and their total.

    Returns:
        (file, reason) of what could not be sorted.

    Raises:
        DiskFullError: there is no room; what was done stays, and can be undone.
        OSError: the folder or the log cannot be written.
    """
    into, failures = Path(os.path.abspath(into.expanduser())), []  # noqa: PTH100
    into.mkdir(parents=True, exist_ok=True)
    with (into / LOG_NAME).open("a+", encoding="ascii") as log:
        log.seek(0)
        log.truncate(log.read().rfind("\n") + 1)  # a line that a kill cut off
        fsync_folder(into)
        _note(log, {"begun": time.strftime("%Y-%m-%d %H:%M:%S"), "how": how})
        for number, (file, target) in enumerate(acts, start=1):
            try:
                _act(log, how, file, target)
            except (OSError, ImageError, shutil.Error) as error:
                if is_disk_full(error):
                    raise disk_full(target) from error
                why = getattr(error, "strerror", None) or str(error)
                failures.append((file, why))
            progress(number, len(acts))
    return failures


def undo(log: Path) -> tuple[int, list[tuple[Path, str]]]:
    """Undo what a log tells, the last first: copies and links go, moved files go back.

    A file that is not what was put there is left as it is. The log is called ``….undone`` afterwards, unless
    something was left.

    Args:
        log: the log, or the folder that it is in.

    Returns:
        How many files were put back or taken away, and (file, reason) of each that was left.

    Raises:
        DataError: there is no such log, or it is not one.
    """
    log = log / LOG_NAME if log.is_dir() else log
    try:
        lines = log.read_bytes().split(b"\n")
        # A line without an end was being written when all stopped: its act had not begun.
        acts = [json.loads(line) for line in lines[:-1] if line.strip()]
        acts = [act for act in acts if "begun" not in act]
        pairs = [(Path(_path(a["from"])), Path(_path(a["to"])), a) for a in acts]
    except OSError as error:
        raise DataError(f"{shown(log)}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown(log)}: no log of sorted files ({error})") from error
    undone, left = 0, []
    for file, target, act in reversed(pairs):
        try:
            with contextlib.suppress(FileNotFoundError):
                _partial(target).unlink()
            undone += _undo(file, target, act)
        except (OSError, DataError) as error:
            left.append((target, getattr(error, "strerror", None) or str(error)))
        with contextlib.suppress(OSError):  # it holds other files
            target.parent.rmdir()
    if not left:
        log.replace(log.with_name(f"{log.name}.{time.strftime('%Y%m%d-%H%M%S')}.undone"))
    return undone, left


def _act(log: Any, how: str, file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        raise FileExistsError(0, f"{target} is there by now")
    piece = piece_of(file)
    data = piece.read()[0] if piece else None
    if data is None:
        file.stat()
    act: dict[str, Any] = {"how": how, "from": str(file), "to": str(target)}
    if how == "link":
        _note(log, act)
        target.symlink_to(file)
        return
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    _note(log, {**act, "sha256": None})
    if how == "move" and file.stat().st_dev == target.parent.stat().st_dev:
        file.rename(target)
        fsync_folder(target.parent)
        return
    try:
        _copy(file if data is None else data, partial)
        _note(log, {**act, "sha256": sha256_of(partial)})
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)
    if how == "move":
        file.unlink()


def _undo(file: Path, target: Path, act: dict[str, Any]) -> bool:
    """Undo one act; whether there was something to undo."""
    if not os.path.lexists(target):
        return False  # it was not done, or undone before
    if act["how"] == "link":
        if not target.is_symlink() or target.readlink() != file:
            raise DataError("is not the link that was made")
        target.unlink()
        return True
    if act["how"] == "move" and not os.path.lexists(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.stat().st_dev == target.parent.stat().st_dev:
            target.rename(file)
        else:
            partial = _partial(file)
            _copy(target, partial)
            partial.replace(file)
            fsync_folder(file.parent)
            target.unlink()
        return True
    if act.get("sha256") is None:  # a later line told the content, and was undone
        raise DataError(f"is no longer what was put there, or there is another {file}")
    if sha256_of(target) != act["sha256"]:
        raise DataError("was changed since it was put there")
    if act["how"] == "move" and sha256_of(file) != act["sha256"]:
        raise DataError(f"another file is at its old place, {file}")
    target.unlink()
    return True


def _copy(source: Path | bytes, partial: Path) -> None:
    """Copy a file, or write these bytes, and have them on the disk."""
    if isinstance(source, bytes):
        partial.write_bytes(source)
    else:
        shutil.copy2(source, partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())


def _note(log: Any, act: dict[str, Any]) -> None:
    log.write(json.dumps(act) + "\n")  # ASCII, also of names that are no UTF-8
    log.flush()
    os.fsync(log.fileno())


def _path(text: Any) -> str:
    if not isinstance(text, str) or not os.path.isabs(text):  # noqa: PTH117 (an address is absolute, too)
        raise ValueError("a path is not absolute")
    return text


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name[:80]}.partial")


def _name(text: str) -> str:
    """A name for a folder or file on any system."""
    plain = _NO_NAME.sub("_", text).strip().rstrip(".") or "_"
    plain = f"_{plain}" if _DEVICES.match(plain) or plain.startswith(".") else plain
    stem, ending = os.path.splitext(plain)  # noqa: PTH122
    while len(os.fsencode(stem + ending)) > 200:
        stem = stem[:-1]
    return stem + ending


def _key(path: Path) -> str:
    return nfc(path.name).casefold()


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names alone)
    except OSError:
        return []


def _is_copy(target: Path, file: Path, sha256: bytes | None, how: str) -> bool:
    """Whether ``target`` is what an earlier sorting of the same work left."""
    if how == "move" or sha256 is None or not target.is_file():
        return False
    if how == "link":
        return target.is_symlink() and target.readlink() == file
    return not target.is_symlink() and sha256_of(target) == sha256.hex()
