"""`rank --html`: a ranked portfolio as one page to look at.

Up to about 2,900 works lie in one file below 30 MB, each with a copy as large as its share of that
allows: 1,024 pixels for some 280 works, 544 for 1,000. More works get a folder of copies beside the page.
The large view shows that copy at once and then the original file, which the page names by its path from
the page's folder; where the page was moved or sent without the originals, the copy stays.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from mirip_fast.config import Config
from mirip_fast.data.remote import address
from mirip_fast.data.sources import is_place
from mirip_fast.errors import DataError
from mirip_fast.evaluation.text_table import printable
from mirip_fast.features.command import default_workers
from mirip_fast.files import write_atomically
from mirip_fast.portfolio.page_file import page_html
from mirip_fast.portfolio.page_maps import PageMap
from mirip_fast.portfolio.rank import RankDone
from mirip_fast.portfolio.rank_intervals import CONFIDENCE
from mirip_fast.portfolio.ranking import given_columns, of_tiers
from mirip_fast.portfolio.score_curves import score_curves
from mirip_fast.portfolio.stacks import Stacked, find_stacks
from mirip_fast.portfolio.thumbnails import Thumbnail, make_thumbnails
from mirip_fast.ranking.held_out import load_held_out

#: Bytes of pictures that one page holds; base64 makes 28 MB of them.
PAGE_BYTES = 21_000_000

_LARGEST, _SMALLEST = 1024, 320  # pixels, of copies inside a page
_BESIDE = 640  # pixels, of copies beside it
_BYTES_PER_AREA = 0.07  # a copy's usual bytes per square of its longer side


@dataclass(frozen=True)
class PageDone:
    """What was written.

    Attributes:
        path: the page.
        folder: the folder of pictures beside it; None where the page holds them.
        bytes: size of the page.
        side: longest side of the copies, in pixels.
        stacks: groups of near duplicates.
    """

    path: Path
    folder: Path | None
    bytes: int
    side: int
    stacks: int


def check_page_path(path: Path) -> None:
    """Refuse a place where no page can be written, before anything is computed.

    Raises:
        DataError: it is a folder, lies in a file, or has another kind of file's ending.
    """
    if path.suffix.lower() not in ("", ".html", ".htm", ".xhtml"):
        raise DataError(
            f"--html {path}: the page is HTML, and no program would open it as {path.suffix}; write it to "
            f"{path.with_suffix('.html')} (a browser prints it to PDF)"
        )
    if path.is_dir():
        raise DataError(
            f"--html {path} is a folder; name a file in it, such as {path / 'report.html'}"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise DataError(f"--html {path}: {parent} is a file, not a folder")


def write_page(
    path: Path,
    done: RankDone,
    config: Config,
    *,
    maps: Mapping[Path, PageMap] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PageDone:
    """Write the page of a ranking.

    Args:
        path: the HTML file; replaced if it exists.
        done: the ranking; held-out scores of its model's run are drawn.
        config: the sections audit (``near_cosine``) and embed (``workers``) are used.
        maps: work's file → why it has its score, for those that were explained.
        progress: called with pictures done and their total.
    """
    files = done.ranking["file"].tolist()
    hashes = [done.hashes[file] for file in files]
    first = {sha: files[i] for i, sha in reversed(list(enumerate(hashes)))}
    extra, reasons = _reasons(maps or {})
    room = PAGE_BYTES - sum(map(len, extra.values()))
    side, max_bytes = _size_of_copies(len(first), room)
    copies = _copies(first, done.root, side, max_bytes, config, progress)
    inside = max_bytes is not None and sum(len(c.webp) for c in copies.values()) <= room
    stacked = find_stacks(
        files, done.ranking["image_id"].tolist(), done.root, done.hashes, done.store, done.model.info,
        config.audit.near_cosine,
    )  # fmt: skip
    names = {sha: sha.hex()[:20] for sha in copies}
    pictures = {names[sha]: copy.webp for sha, copy in copies.items() if copy.webp}
    pictures.update(extra)
    folder = None if inside else path.with_name(f"{path.stem}_files")
    data = {
        **_about(done),
        "pictures": None if folder is None else quote(os.fsencode(folder.name)),
        "works": [
            {
                **work,
                "picture": names[sha] if copies[sha].webp else None,
                **reasons.get(done.root / file, {"map": None, "likes": []}),
            }
            for work, sha, file in zip(_works(done, path, stacked), hashes, files, strict=True)
        ],
        "failures": [
            {"name": printable(os.path.relpath(file, done.root)), "reason": printable(reason)}
            for file, reason in done.failures
        ],
    }
    if folder is not None:
        _write_pictures(folder, pictures)
    text = page_html(data["title"], data, {} if folder else pictures).encode("utf-8")
    write_atomically(path, partial(_put, text))
    return PageDone(path, folder, len(text), side, len({s.stack for s in stacked.values()}))


def _reasons(
    maps: Mapping[Path, PageMap],
) -> tuple[dict[str, bytes], dict[Path, dict[str, Any]]]:
    """Pictures by name, and what the page says of each explained work."""
    pictures: dict[str, bytes] = {}

    def named(webp: bytes) -> str | None:
        if not webp:
            return None
        name = hashlib.sha256(webp).hexdigest()[:20]
        pictures[name] = webp
        return name

    said = {}
    for path, reason in maps.items():
        likes = [
            {
                "name": printable(like.path.name),
                "tier": printable(like.tier),
                "cosine": round(like.cosine, 4),
                "picture": named(copy.webp),
            }
            for like, copy in reason.likes
        ]
        said[path] = {"map": named(reason.webp), "likes": likes}
    return pictures, said


def _size_of_copies(count: int, room: int) -> tuple[int, int | None]:
    """Longest side in pixels, and the bytes that one copy may take inside the page; None: beside it."""
    share = max(0, room) // max(1, count)
    side = int(math.sqrt(share / _BYTES_PER_AREA)) // 32 * 32
    return (_BESIDE, None) if side < _SMALLEST else (min(_LARGEST, side), share)


def _copies(
    first: Mapping[bytes, str],
    root: Path,
    side: int,
    max_bytes: int | None,
    config: Config,
    progress: Callable[[int, int], None],
) -> dict[bytes, Thumbnail]:
    """Content → its small copy; equal files are decoded once."""
    workers = min(len(first), default_workers(config.embed.workers))
    limit = PAGE_BYTES if max_bytes is None else max_bytes
    made = make_thumbnails((root / name for name in first.values()), side, limit, workers=workers)
    copies = {}
    for number, (sha, copy) in enumerate(zip(first, made, strict=True), start=1):
        copies[sha] = copy
        progress(number, len(first))
    return copies


def _about(done: RankDone) -> dict[str, Any]:
    """What the numbers of the page rest on."""
    known, model = done.calibration, done.model
    run = model.checkpoint.parent
    held_out = None if known.source == "none" else load_held_out(run, model.info.tiers)
    scores = done.ranking["score"].tolist()
    heat = None if known.temperature is None else known.temperature.value
    return {
        "title": printable(done.root.absolute().name) or "portfolio",
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
        "model": printable(run.name),
        "tiers": [printable(name) for name in known.tier_names],
        "source": None if known.source == "none" else known.source,
        "heldOut": known.images,
        "remarks": [printable(text) for text in known.warnings()],
        "within": known.within and printable(known.within),
        # Divides a difference of scores; 0 stands for an infinite one: every pair is even.
        "sharpness": None if heat is None else 0 if math.isinf(heat) else 1 / heat,
        "heads": done.heads,
        "byProcess": model.knows_grades,
        "byPairs": model.process is not None and len(model.process.told) > 0,
        "confidence": CONFIDENCE,
        "noIntervals": done.no_intervals and printable(done.no_intervals),
        "seen": done.seen,
        "anchors": None
        if done.anchors is None
        else {
            "counts": list(done.anchors.counts),
            "remarks": [printable(text) for text in done.anchors.remarks()],
        },
        "curves": None
        if held_out is None or not len(held_out)
        else score_curves(held_out, [printable(name) for name in known.tier_names], scores),
    }


def _works(done: RankDone, page: Path, stacked: Mapping[int, Stacked]) -> Iterator[dict[str, Any]]:
    ranking = done.ranking
    chances, wins = of_tiers(ranking, "p"), of_tiers(ranking, "wins")
    given = given_columns(ranking)
    for i, work in enumerate(ranking.to_dict("records")):
        place = stacked.get(i)
        known = bool(chances)
        yield {
            "rank": work["rank"],
            "low": work.get("rank_low"),
            "high": work.get("rank_high"),
            "settled": work.get("settled"),
            "score": float(f"{work['score']:.6g}"),
            "percent": round(work["score_100"], 1) if "score_100" in work else None,
            "chances": [round(work[c], 4) for c in chances.values()] if known else None,
            "tier": done.calibration.tier_names.index(work["tier"]) if known else None,
            "wins": [None if math.isnan(work[c]) else round(work[c], 4) for c in wins.values()]
            if wins
            else None,
            "name": printable(work["file"]),
            "id": printable(work["image_id"]),
            "given": [
                [printable(c), printable(str(work[c]))] for c in given if work[c] not in (None, "")
            ],
            "original": _address(done.root / work["file"], page),
            "stack": None if place is None else place.stack,
            "exact": place is not None and place.exact,
            "cosine": None if place is None else round(place.cosine, 4),
        }


def _address(file: Path, page: Path) -> str | None:
    """A file as an address from the page; None where a browser has no way (in a tar, another drive)."""
    if is_place(file):
        url = address(file)
        return url if url.startswith(("http://", "https://")) and ".tar/" not in url else None
    try:
        relative = os.path.relpath(file, page.absolute().parent)
    except ValueError:
        return None
    # «./» before it, so that no name is taken for a scheme; bytes, as names need not be UTF-8.
    return "./" + quote(os.fsencode(relative.replace(os.sep, "/")))


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write one file per picture, and remove those of an earlier page at the same place.

    The names have no ending, so that a page inside a folder of works does not add works to it: browsers
    know pictures by their content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, webp in pictures.items():
        write_atomically(folder / name, partial(_put, webp))
    for old in folder.iterdir():
        if re.fullmatch("[0-9a-f]{20}", old.name) and old.name not in pictures:
            old.unlink()


def _put(content: bytes, stream: IO[bytes]) -> None:
    stream.write(content)
