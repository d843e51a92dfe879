"""`rank --html`: a ranked portfolio as one page to look at and to work on.

Up to about 2,900 works lie in one file below 30 MB, each with a copy as large as its share of that
allows: 1,024 pixels for some 280 works, 544 for 1,000. More works get a folder of copies beside the page.
The large view shows that copy at once and then the original file, which the page names by its path from
the page's folder; where the page was moved or sent without the originals, the copy stays.

A page is one HTML file from parts beside this module: style, script, words and data. Nothing in it comes from
elsewhere, and nothing that came from outside (file names, reasons) is ever HTML: data is JSON in a block that
browsers do not run, and the script makes text of it, never markup. The page's Content-Security-Policy admits
only its own script and style, by their hashes, and pictures.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.config import Config
from mirip_fast.data.formats import split_page
from mirip_fast.data.sources import is_place
from mirip_fast.errors import DataError
from mirip_fast.evaluation.agreement import agreement
from mirip_fast.evaluation.text_table import printable
from mirip_fast.features.neighbours import open_gallery
from mirip_fast.features.phase_one import default_workers
from mirip_fast.features.recipe import series_name
from mirip_fast.files import has_file, write_bytes
from mirip_fast.language import in_other_languages
from mirip_fast.portfolio.rank import RankDone
from mirip_fast.portfolio.ranking import CONFIDENCE, applicant_records, given_columns, of_tiers
from mirip_fast.portfolio.similar import group_copies
from mirip_fast.portfolio.thumbnails import encode_picture, make_thumbnails
from mirip_fast.ranking.anchors import anchor_counts, anchor_remarks
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.text import address
from mirip_fast.training.run_folder import SPLIT_FILE

if TYPE_CHECKING:
    import pandas as pd

FloatArray: TypeAlias = NDArray[np.float64]
#: Why a work has its score: the map over its picture, a WebP file, and the graded works that it looks like.
Reason: TypeAlias = "tuple[bytes, pd.DataFrame]"

#: Bytes of pictures that one page holds; base64 makes 28 MB of them.
PAGE_BYTES = 21_000_000

_LARGEST, _SMALLEST = 1024, 320  # pixels, of copies inside a page
_BESIDE = 640  # pixels, of copies beside it
_BYTES_PER_AREA = 0.07  # a copy's usual bytes per square of its longer side
_MAP_SIDE = 640  # pixels; the map itself has a few steps along each edge
_LIKE_SIDE, _LIKE_BYTES = 160, 12_000

# Of each kind of page, by its folder: the scripts after those that all pages share.
_SCRIPTS = {
    "page_files": (
        "applicants.js",
        "gallery.js",
        "marks.js",
        "select.js",
        "filters.js",
        "exports.js",
        "compare.js",
        "large.js",
        "zoom.js",
        "keys.js",
        "main.js",
    ),
    "evaluation_files": ("plots.js", "parts.js", "main.js"),
}
_SHARED_SCRIPTS = ("words.js", "elements.js", "theme.js", "charts.js")
_NOT_IN_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}

_POINTS = 96  # of a curve
_TICKS = 400  # single scores shown per tier at most
_MARGIN = 0.05  # of the range, left free at both ends


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


def explain_works(
    model: ScoreModel,
    paths: Sequence[Path],
    config: Config,
    *,
    backbone: str | None = None,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Path, Reason]:
    """Why works have their scores, for their page; those that cannot be read any more are left out.

    Args:
        model: what scored them.
        paths: image files.
        config: the sections explain, embed and runtime are used.
        backbone: another place of the model's backbone, if it moved.
        command: what is running, for whoever finds the store locked.
        progress: called with passes of the backbone done and their total.

    Raises:
        BackboneError: the backbone cannot be found.
    """
    from mirip_fast.portfolio.explain import Explainer

    explainer = Explainer(model, config, backbone=backbone, command=command)
    total, passed = explainer.passes(len(paths)), 0

    def count(new: int) -> None:
        nonlocal passed
        passed += new
        progress(passed, total)

    return {
        explained.path: (encode_picture(explained.overlay(), _MAP_SIDE), explained.likes)
        for explained in explainer.explain(paths, failures=[], progress=count)
    }


def write_page(
    path: Path,
    done: RankDone,
    config: Config,
    *,
    reasons: Mapping[Path, Reason] | None = None,
    live: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write the page of a ranking.

    Args:
        path: the HTML file; replaced if it exists.
        done: the ranking; held-out scores of its model's run are drawn.
        config: the sections audit (``near_cosine``) and embed (``workers``) are used.
        reasons: work's file → why it has its score, for those that were explained.
        live: the page is served, and asks its server for originals and marks.
        progress: called with pictures done and their total.

    Returns:
        The page, and the folder of pictures beside it where it does not hold them.
    """
    names = done.ranking["file"].tolist()
    hashes = [done.hashes[name] for name in names]
    first = {sha: done.root / name for name, sha in zip(names[::-1], hashes[::-1], strict=True)}
    first = dict(
        reversed(first.items())
    )  # equal files are decoded once, in the order of the ranking
    pictures, why = _reasons(reasons or {}, config)
    room = PAGE_BYTES - sum(map(len, pictures.values()))
    side, max_bytes = _size_of_copies(len(first), room)
    made = pictures_of(first.values(), side, max_bytes or PAGE_BYTES, config)
    copies: dict[bytes, str | None] = {}
    size = 0
    for number, (sha, (_, webp)) in enumerate(zip(first, made, strict=True), start=1):
        size += len(webp)
        copies[sha] = sha.hex()[:20] if webp else None
        if webp:
            pictures[sha.hex()[:20]] = webp
        progress(number, len(first))
    folder = path.with_name(f"{path.stem}_files") if max_bytes is None or size > room else None
    stacks = find_stacks(done, config.audit.near_cosine)
    works = zip(_works(done, path, stacks), hashes, names, strict=True)
    data = {
        **_about(done),
        "live": live,
        "attention": config.explain.map == "attention",
        "pictures": None if folder is None else quote(os.fsencode(folder.name)),
        "works": [
            {
                **work,
                "key": key_of(name, sha),
                **({"original": f"original/{number}"} if live else {}),
                "picture": copies[sha],
                **why.get(done.root / name, {"map": None, "likes": []}),
            }
            for number, (work, sha, name) in enumerate(works)
        ],
        **_people(done),
        "failures": [
            {"name": printable(os.path.relpath(file, done.root)), "reason": printable(reason)}
            for file, reason in done.failures
        ],
    }
    data["spoken"] = in_other_languages(_said(data))
    if folder is not None:
        _write_pictures(folder, pictures)
    write_html(path, data, {} if folder else pictures, "page_files")
    return [path] if folder is None else [path, folder]


def pictures_of(
    paths: Iterable[Path], side: int, max_bytes: int, config: Config
) -> Iterator[tuple[str | None, bytes]]:
    """(name, WebP file) of the small copy of each picture, (None, b"") where it cannot be read."""
    paths = list(paths)
    workers = min(len(paths), default_workers(config.embed.workers))
    for webp in make_thumbnails(paths, side, max_bytes, workers=workers):
        yield hashlib.sha256(webp).hexdigest()[:20] if webp else None, webp


def _reasons(
    reasons: Mapping[Path, Reason], config: Config
) -> tuple[dict[str, bytes], dict[Path, dict[str, Any]]]:
    """Pictures by name, and what the page says of each explained work."""
    found = [table for _, table in reasons.values() if not table.empty]
    likes = list(dict.fromkeys(file for table in found for file in table["file"]))
    made = list(pictures_of(likes, _LIKE_SIDE, _LIKE_BYTES, config))
    pictures = {name: webp for name, webp in made if name is not None}
    names = {path: name for path, (name, _) in zip(likes, made, strict=True)}
    said = {}
    for path, (webp, table) in reasons.items():
        name = hashlib.sha256(webp).hexdigest()[:20]
        pictures[name] = webp
        said[path] = {
            "map": name,
            "likes": [
                {
                    "name": printable(like["file"].name),
                    "tier": printable(like["tier"] or ""),
                    "cosine": round(like["cosine"], 4),
                    "picture": names[like["file"]],
                }
                for like in table.to_dict("records")
            ],
        }
    return pictures, said


def _size_of_copies(count: int, room: int) -> tuple[int, int | None]:
    """Longest side in pixels, and the bytes that one copy may take inside the page; None: beside it."""
    share = max(0, room) // max(1, count)
    side = int(math.sqrt(share / _BYTES_PER_AREA)) // 32 * 32
    return (_BESIDE, None) if side < _SMALLEST else (min(_LARGEST, side), share)


def find_stacks(done: RankDone, near_cosine: float) -> dict[int, dict[Any, Any]]:
    """Place in the ranking → what :func:`group_copies` says of a work in a stack of near duplicates.

    Works that are like no other are not in it; none is where the store keeps no CLS features.
    """
    series = series_name(done.model.info.views[0], "cls")
    if series not in done.store.series():
        return {}
    ranking = done.ranking
    place = {done.root / file: i for i, file in enumerate(ranking["file"])}
    works = ranking[["image_id"]].assign(
        file=[*map(str, place)], sha256=ranking["file"].map(done.hashes), tier=None
    )
    copies = group_copies(open_gallery(works, [done.store], series), near_cosine)
    return {place[row["file"]]: row for row in copies.to_dict("records")}


def _about(done: RankDone) -> dict[str, Any]:
    """What the numbers of the page rest on."""
    known, model = done.calibration, done.model
    run = model.checkpoint.parent
    held_out = None if known.source == "none" else load_held_out(run, model.info.tiers)
    names = [printable(name) for name in known.tier_names]
    curves = None
    if held_out is not None and len(held_out):  # without tiers, one curve without a name
        tiers = held_out.tier_codes if names else np.zeros(len(held_out), dtype=np.int64)
        curves = tier_curves(held_out.scores, tiers, names or [""], done.ranking["score"])
    fitted = known.temperature
    sharpness = fitted and (0 if math.isinf(fitted["value"]) else 1 / fitted["value"])
    anchors = done.anchors
    return {
        # What the user says of works is kept under these names, by this page and by later ones.
        "key": key_of_ranking(done),
        "columns": [printable(column) for column in _given(done)],
        "title": printable(done.root.absolute().name) or "portfolio",
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
        "model": printable(run.name),
        "tiers": names,
        "source": None if known.source == "none" else known.source,
        "heldOut": known.images,
        "remarks": [
            printable(text) for text in [*known.warnings(), *_ceiling(run, model.info.tiers)]
        ],
        "within": known.within and printable(known.within),
        # Multiplies a difference of scores; 0: every pair is even.
        "sharpness": sharpness,
        "byPairs": model.process is not None and model.process.pairs_alone,
        "confidence": CONFIDENCE,
        "noIntervals": done.no_intervals and printable(done.no_intervals),
        "seen": done.seen,
        "anchors": anchors
        and {
            "counts": list(anchor_counts(anchors).values()),
            "remarks": [printable(text) for text in anchor_remarks(anchors)],
        },
        "curves": curves,
    }


def _ceiling(run: Path, tiers: Sequence[str]) -> list[str]:
    """How far several graders of the model's works agree, in a sentence; none where there is one grader."""
    path = run / SPLIT_FILE
    found = agreement(load_split(path, tiers).table) if tiers and has_file(path) else None
    if found is None or np.isnan(found.figures["ceiling"]):
        return []
    share = 100 * found.figures["ceiling"]
    return [
        f"Of pairs that the other graders order, one grader orders {share:.0f} % alike (the human ceiling)."
    ]


def _said(data: dict[str, Any]) -> list[str]:
    """What the page shows in sentences that the program said in English."""
    said = [*data["remarks"], *((data["anchors"] or {}).get("remarks", []))]
    said += [*((data["portfolio"] or {}).get("said", [])), *filter(None, [data["noIntervals"]])]
    said += [failure["reason"] for failure in data["failures"]]
    return said


def _people(done: RankDone) -> dict[str, Any]:
    """Applicants, the best first, with the places of their works in the ranking; and what is said of them."""
    people = done.applicants
    if people is None:
        return {"applicants": None, "portfolio": None}
    place = {file: i for i, file in enumerate(done.ranking["file"])}
    listed = [
        {
            **person,
            "name": printable(person["name"]),
            "works": [place[file] for file in person["works"]],
        }
        for person in applicant_records(people)
    ]
    portfolio = done.portfolio
    said = [printable(text) for text in (portfolio["why"], *portfolio["remarks"])]
    return {
        "applicants": listed,
        "portfolio": {
            "by": printable(portfolio["by"]),
            "within": portfolio["within"],
            "said": said,
        },
    }


def _given(done: RankDone) -> list[str]:
    """The columns that came with the works; that of applicants may stand before the file."""
    own = ["applicant"] if done.portfolio.get("by") == "applicant" else []
    return [*given_columns(done.ranking), *own]


def _works(
    done: RankDone, page: Path, stacks: Mapping[int, Mapping[Any, Any]]
) -> Iterator[dict[str, Any]]:
    import pandas as pd

    ranking = done.ranking
    chances, wins = of_tiers(ranking, "p").values(), of_tiers(ranking, "wins").values()
    given = _given(done)
    for i, work in enumerate(ranking.to_dict("records")):
        copy = stacks.get(i)
        rates = [None if math.isnan(work[c]) else round(work[c], 4) for c in wins]
        yield {
            "rank": work["rank"],
            "low": work.get("rank_low"),
            "high": work.get("rank_high"),
            "settled": work.get("settled"),
            "score": float(f"{work['score']:.6g}"),
            "percent": work.get("score_100"),
            "chances": [round(work[c], 4) for c in chances] or None,
            "tier": done.calibration.tier_names.index(work["tier"]) if chances else None,
            "wins": rates or None,
            "name": printable(work["file"]),
            **({} if printable(work["file"]) == work["file"] else {"file": work["file"]}),
            "id": printable(work["image_id"]),
            "given": [
                [printable(c), printable(str(work[c]))]
                for c in given
                if not pd.isna(work[c]) and work[c] != ""
            ],
            "original": _address(done.root / work["file"], page),
            "stack": copy and copy["group"],
            "exact": copy is not None and copy["exact"],
            "cosine": copy and round(copy["cosine"], 4),
        }


def key_of(name: str, content: bytes) -> str:
    """16 hexadecimal digits that name a work in marks: by its file name and its content's hash."""
    named = name.encode("utf-8", "surrogateescape") + b"\0" + content
    return hashlib.sha256(named).hexdigest()[:16]


def key_of_ranking(done: RankDone) -> str:
    """The same for a ranking: by its folder, so that marks stay when works are added."""
    return key_of(address(done.root.absolute()), b"")


def _address(file: Path, page: Path) -> str | None:
    """A file as an address from the page; None where a browser has no way (in a tar, another drive)."""
    whole, of_pdf = split_page(str(file))
    if is_place(Path(whole)):
        url = address(file)
        return url if url.startswith(("http://", "https://")) and ".tar/" not in url else None
    try:
        relative = os.path.relpath(whole, page.absolute().parent)
    except ValueError:
        return None
    # «./» before it, so that no name is taken for a scheme; bytes, as names need not be UTF-8.
    return "./" + quote(os.fsencode(relative.replace(os.sep, "/"))) + of_pdf


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write one file per picture, and remove those of an earlier page at the same place.

    The names have no ending, so that a page inside a folder of works does not add works to it: browsers
    know pictures by their content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, webp in pictures.items():
        write_bytes(folder / name, webp)
    for old in folder.iterdir():
        if re.fullmatch("[0-9a-f]{20}", old.name) and old.name not in pictures:
            old.unlink()


def tier_curves(
    graded: FloatArray, tiers_of: NDArray[np.int64], names: Sequence[str], scores: ArrayLike = ()
) -> dict[str, Any]:
    """Curves of the scores of graded works of each tier on one axis.

    Args:
        graded: [m] scores of graded works that the model had not trained on.
        tiers_of: [m] their tiers, 0 = best.
        names: of the tiers, best first.
        scores: [n] further scores that the axis has to hold.

    Returns:
        ``low`` and ``high``, the ends of the axis in units of the score; ``tiers``: per tier its name,
        count, ``curve`` (heights 0–1 at equal distances from ``low`` to ``high``; 1 is the peak of that
        tier), ``median`` and ``ticks`` (single scores, all or an even choice of them).
    """

    def short(value: float) -> float:
        return float(f"{value:.6g}")

    everything = np.concatenate([graded, np.asarray(scores, np.float64)])
    low, high = float(everything.min()), float(everything.max())
    margin = _MARGIN * (high - low) or 1.0
    low, high = low - margin, high + margin
    grid = np.linspace(low, high, _POINTS)
    tiers = []
    for tier, name in enumerate(names):
        values = np.sort(graded[tiers_of == tier])
        ticks = np.unique(np.linspace(0, len(values) - 1, _TICKS).round().astype(int))
        tiers.append(
            {
                "name": name,
                "count": len(values),
                "curve": [round(y, 3) for y in density(values, grid).tolist()],
                "median": short(float(np.median(values))) if len(values) else None,
                "ticks": [short(x) for x in values[ticks]] if len(values) else [],
            }
        )
    return {"low": short(low), "high": short(high), "tiers": tiers}


def density(values: FloatArray, grid: FloatArray) -> FloatArray:
    """Gaussian kernel density at the points of ``grid``, scaled to a peak of 1; 0 for fewer than 2 values.

    The bandwidth is Silverman's rule of thumb, 0.9 · min(σ, IQR / 1.34) · n^(−1/5) (Silverman 1986,
    Density Estimation for Statistics and Data Analysis, equation 3.31).
    """
    if len(values) < 2:
        return np.zeros_like(grid)
    quarter, three = np.percentile(values, [25, 75])
    spread = min((s for s in (values.std(ddof=1), (three - quarter) / 1.34) if s > 0), default=0.0)
    width = max(0.9 * spread * len(values) ** -0.2, (grid[1] - grid[0]) / 2)
    heights = np.array([np.exp(-0.5 * ((x - values) / width) ** 2).sum() for x in grid])
    return heights / float(heights.max())


def write_html(path: Path, data: dict[str, Any], pictures: Mapping[str, bytes], kind: str) -> None:
    """Write a page.

    Args:
        path: the HTML file; replaced if it exists.
        data: what the script shows, plain JSON types, and the ``title``; ``words`` is added.
        pictures: name → WebP file to be kept inside the page.
        kind: of page: ``page_files``, a ranked portfolio, or ``evaluation_files``, how good a model is.
    """
    text: dict[str, dict[str, str]] = {}
    for folder in dict.fromkeys(("page_files", kind)):
        for language, said in json.loads(_part(f"{folder}/words.json")).items():
            text.setdefault(language, {}).update(said)
    style = "\n".join((_part("page_files/look.css"), _part(f"{kind}/page.css")))
    scripts = [f"page_files/{name}" for name in _SHARED_SCRIPTS]
    scripts += [f"{kind}/{name}" for name in _SCRIPTS[kind]]
    script = "\n".join(map(_part, scripts))
    policy = (
        "default-src 'none'", f"script-src {_hash(script)}", f"style-src {_hash(style)}",
        "img-src data: 'self' file:",  # the page's folder, where the page is opened as a file
        *(["connect-src 'self'"] if data.get("live") else []),
        "base-uri 'none'", "form-action 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )  # fmt: skip
    filled = {
        "policy": html.escape("; ".join(policy)),
        "title": html.escape(data["title"]),
        "style": style,
        "data": json_for_html({**data, "words": text}),
        "pictures": "\n".join(_picture(name, webp) for name, webp in pictures.items()),
        "script": script,
    }
    # In one pass: what is filled in is not looked at again.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _part(f"{kind}/page.html"))
    write_bytes(path, page.encode("utf-8"))


def json_for_html(value: object) -> str:
    """JSON that stays what it is inside a ``<script>`` block: ASCII without ``<``, ``>`` and ``&``.

    Names that are not UTF-8 (lone surrogates) survive as escapes.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: _NOT_IN_HTML[found[0]], text)


def _picture(name: str, webp: bytes) -> str:
    url = "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
    # A block of its own, so that the script touches the text of those pictures only that are looked at.
    return f'<script type="application/json" id="picture-{name}">"{url}"</script>'


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").strip()
