"""`audit`: what is wrong with a data set before anyone trusts a score that was learned from it."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.locate import FileFinder
from mirip_fast.data.manifest import is_there, read_manifest
from mirip_fast.data.pair_files import FIRST, SECOND, read_verdicts, unknown_works
from mirip_fast.data.remote import is_remote
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.data.splits import GROUP, ID, NEAR_GROUPS_FILE, SPLITS
from mirip_fast.data.table import joined, or_none
from mirip_fast.errors import ConfigError, ImageError, RunNotFoundError
from mirip_fast.evaluation.metrics import PairCounter, ratio, tiers_by_quota
from mirip_fast.evaluation.text_table import format_table, printable
from mirip_fast.features.datasets import Dataset, find_datasets, newest_dataset
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.neighbours import (
    FloatArray,
    Gallery,
    base_series,
    open_gallery,
    stores_of,
)
from mirip_fast.files import spreadsheet_safe, write_csv
from mirip_fast.language import tr
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.text import closest, counted, nfc, path_of, shown
from mirip_fast.training.run_folder import SPLIT_FILE, Run, find_runs, run_in_use

if TYPE_CHECKING:
    import pandas as pd
    from networkx import DiGraph

log = logging.getLogger(__name__)

AUDIT_FILE = "audit.csv"

#: Gravest first. An error makes a measured accuracy untrue or grades contradict each other; a warning
#: is worth a look; a note is only told.
SEVERITIES = ("error", "warning", "note")

#: Kind → (severity, what it means for a person).
KINDS = {
    "copy-across-splits": ("error", "the same file in different splits"),
    "near-across-splits": ("error", "near duplicates in different splits"),
    "group-across-splits": ("error", "a group in different splits"),
    "copy-other-tier": ("error", "the same file with different tiers"),
    "near-other-tier": ("warning", "near duplicates with different tiers"),
    "disagreement": ("warning", "held-out score contradicts the tier"),
    "cycle": ("warning", "judgements that contradict each other"),
    "unreadable": ("warning", "files that could not be embedded"),
    "missing": ("warning", "files that are gone"),
    "changed": ("warning", "files that changed since they were embedded"),
    "not-embedded": ("warning", "images without features"),
    "copy": ("note", "the same file more than once"),
    "near": ("note", "near duplicates"),
}

_COLUMNS = (
    "kind", "severity", "images", "rows", "splits", "tiers", "value", "advice", "paths",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        kind: one of :data:`KINDS`.
        images: a row per image, with its ``image_id`` and as far as known ``file``, ``row``, ``split`` and
            ``tier``; of a cycle, ``row`` is the line of a judgement in its file.
        advice: what to do.
        value: what was measured, in words.
        weight: for the order among findings of a kind, the largest first.
    """

    kind: str
    images: pd.DataFrame
    advice: str
    value: str = ""
    weight: float = 0.0

    @property
    def severity(self) -> str:
        """How grave it is, one of :data:`SEVERITIES`."""
        return KINDS[self.kind][0]

    def each(self, column: str) -> list[str]:
        """A column's value of each image, - where it has none; nothing where no image has one."""
        values = or_none(self.images[column]) if column in self.images else []
        return [str(value or "-") for value in values] if any(values) else []


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write one line per finding; cells with several values have «; » between them."""
    of_column = {
        "images": "image_id",
        "rows": "row",
        "splits": "split",
        "tiers": "tier",
        "paths": "file",
    }
    rows = [
        {
            "kind": finding.kind,
            "severity": finding.severity,
            "value": finding.value,
            "advice": finding.advice,
            **{n: spreadsheet_safe("; ".join(finding.each(c))) for n, c in of_column.items()},
        }
        for finding in findings
    ]
    write_csv(path, _COLUMNS, rows)


def failing_kinds(text: str) -> frozenset[str]:
    """The kinds that ``--fail-on`` names.

    Args:
        text: ``none``, a severity (it stands for itself and all graver ones), or kinds; several are
            separated by commas.

    Raises:
        ConfigError: an unknown word.
    """
    chosen: set[str] = set()
    for word in (part.strip() for part in text.split(",")):
        if word in SEVERITIES:
            grave = SEVERITIES[: SEVERITIES.index(word) + 1]
            chosen |= {kind for kind, (severity, _) in KINDS.items() if severity in grave}
        elif word in KINDS:
            chosen.add(word)
        elif word not in ("none", ""):
            known = ["none", *SEVERITIES, *KINDS]
            close = closest(word, known)
            hint = f" Did you mean {close}?" if close else ""
            raise ConfigError(f"--fail-on {word}: none of {', '.join(known)}.{hint}")
    return frozenset(chosen)


#: What is known of an image that was embedded; ``split`` is where it was split.
_KNOWN = ("image_id", "file", "row", "group", "tier_score", "tier", "sha256")


def look_at(dataset: Dataset, cache_dir: Path) -> tuple[pd.DataFrame, list[Finding]]:
    """The embedded images of a data set, and what is wrong with its files.

    Args:
        dataset: an embedded data set; its folder or CSV file is read again where it is still there.
        cache_dir: where content hashes are remembered.

    Returns:
        A table of images with grades as the data reads now, and findings.

    Raises:
        DataError: the CSV file is faulty.
    """
    kept = dataset.images().drop_duplicates("file", keep="last").set_index("file")
    now = _current_images(dataset)
    for name in ("status", "reason", "sha256"):
        now[name] = now["file"].map(kept[name])
    again = f"run `mirip-fast embed {shown(dataset.source)}` again"
    left_out = "mend or replace the file; it is left out of training and ranking"
    absent, failed = now["status"].isna(), now["status"] == "failed"
    findings = [Finding("not-embedded", image, again) for image in _each(now[absent])]
    findings += [
        Finding("unreadable", image, left_out, image["reason"].iloc[0] or "")
        for image in _each(now[failed])
    ]
    images = now.loc[~absent & ~failed, [*_KNOWN]]
    return images, findings + _gone_or_changed(images, cache_dir, dataset)


def _current_images(dataset: Dataset) -> pd.DataFrame:
    """The data's images as its source reads now; those of the ledger where it cannot be read."""
    info, kept = dataset.info, dataset.images()
    now = kept
    keep_indexes_in(dataset.store_path.parent)
    if is_there(dataset.source):
        now = read_manifest(dataset.source, dataset.data).table[: info["limit"]]
        from_folder = os.path.isdir(dataset.source)  # noqa: PTH112 - a list of tars is longer than names may be
        if from_folder and (now["row"] == 0).all():
            # A folder's list lacks the files that are gone.
            now = joined([now, kept[~kept["file"].isin(now["file"])]])
    else:
        why = "lies at an address" if is_remote(dataset.source) else "is gone"
        log.warning("%s %s: the grades kept in the cache are audited", shown(dataset.source), why)
    return now.reset_index(drop=True)


def _gone_or_changed(images: pd.DataFrame, cache_dir: Path, dataset: Dataset) -> list[Finding]:
    finder = FileFinder()
    there = np.array([finder.exists(Path(file)) for file in images["file"]], dtype=bool)
    put_back = "put the file back, or take its row out"
    findings = [Finding("missing", one, put_back) for one in _each(images[~there])]
    again = f"run `mirip-fast embed {shown(dataset.source)}` again, and train again"
    present = images[there]
    with open_hashes(cache_dir) as hashes:
        now = list(hashes.sha256_many([Path(file) for file in present["file"]]))
    for number, (before, sha) in enumerate(zip(present["sha256"], now, strict=True)):
        image = present.iloc[[number]] if sha != before else present
        if isinstance(sha, ImageError):
            findings.append(Finding("unreadable", image, "mend or replace the file", str(sha)))
        elif sha != before:
            findings.append(Finding("changed", image, again))
    return findings


def _each(images: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Each row as a table of its own."""
    return (images.iloc[number : number + 1] for number in range(len(images)))


def run_of(dataset: Dataset, output_dir: Path, run: Path | None) -> Run | None:
    """The run that ``run`` names, else that in use or the newest finished one, if trained on the data set.

    Raises:
        RunNotFoundError: ``run`` is no run.
    """
    if run is not None:
        folder = run if run.is_dir() else run.parent
        if not Run(folder).has(SPLIT_FILE):
            raise RunNotFoundError(f"--run {run}: there is no {folder / SPLIT_FILE}")
        return Run(folder)
    for found in filter(None, (run_in_use(output_dir), *find_runs(output_dir))):
        info = found.info
        trained = info.get("status") == "finished" and not info.get("debug")
        if trained and info.get("dataset") == str(dataset.source):
            return found
    return None


def with_splits(
    images: pd.DataFrame, dataset: Dataset, run: Run | None
) -> tuple[pd.DataFrame, str | None]:
    """Say which split each image is in: as the run trained, else as the files of `split` say.

    Returns:
        The images with a column ``split`` (None: in none), and the file or files where the splits stand;
        None where there are none.

    Raises:
        DataError: these files are damaged.
    """
    info = dataset.info
    data = dataset.data
    split_of: dict[str, str] = {}
    where: str | None = None
    if run is not None:
        path = run.path / SPLIT_FILE
        known = load_split(path, info["tiers"], data)
        split_of = dict(zip(known.ids, known.splits, strict=True))
        where = str(path)
    else:
        files = {name: Path(info["root"]) / f"{name}_metadata.csv" for name in SPLITS}
        files = {name: path for name, path in files.items() if path.is_file()}
        for name, path in files.items():
            ids = read_manifest(path, data).ids
            split_of |= dict.fromkeys(ids, name)
        where = ", ".join(map(str, files.values())) or None
    splits = [split_of.get(image_id) for image_id in images["image_id"]]
    return images.assign(split=np.array(splits, dtype=object)), where


_BLOCK = 1024
_CYCLES = 5  # named per component
_STARTS = 1000  # images from which cycles are looked for in one component
_REACHED = 500_000  # images reached on the way, after which no more are started from


def copies(images: pd.DataFrame) -> list[Finding]:
    """Files with the same bytes under different names."""
    findings = []
    for same in _several(images, "sha256"):
        splits, tiers = _names(same, "split"), _names(same, "tier")
        value = f"{counted(len(same), 'file')} with the same bytes"
        if len(splits) > 1:
            advice = (
                "split again with `mirip-fast split` or `train`, which keep equal files together"
            )
            findings.append(Finding("copy-across-splits", same, advice, value, len(same)))
        if len(tiers) > 1:
            advice = "decide on one tier, and keep one of them"
            findings.append(Finding("copy-other-tier", same, advice, value, len(same)))
        if len(splits) < 2 and len(tiers) < 2:
            advice = "keep one of them, or it counts more than once"
            findings.append(Finding("copy", same, advice, value, len(same)))
    return findings


def straddling_groups(images: pd.DataFrame) -> list[Finding]:
    """Values of the group column whose images are in different splits."""
    findings = []
    for members in _several(images, "group"):
        splits = _names(members, "split")
        if len(splits) > 1:
            named = ", ".join(f"{name} {(members['split'] == name).sum()}" for name in splits)
            advice = "split again with `mirip-fast split` or `train`, which keep groups together"
            value = f"group {members['group'].iloc[0]!r}: {named}"
            found = Finding("group-across-splits", members, advice, value, len(members))
            findings.append(found)
    return findings


def near_duplicates(
    gallery: Gallery, groups: Iterable[Sequence[int]], images: pd.DataFrame
) -> list[Finding]:
    """What is wrong with groups of near duplicates.

    Args:
        gallery: the works.
        groups: numbers of contents, from :meth:`mirip_fast.features.neighbours.Gallery.groups`.
        images: the same works as the audit knows them.
    """
    by_hash = dict(tuple(images.groupby("sha256", sort=False)))
    place = {sha: i for i, sha in enumerate(by_hash)}  # the order of the data
    findings = []
    for group in groups:
        numbers = sorted(group, key=lambda number: place[gallery.hashes[number]])
        contents = [by_hash[gallery.hashes[number]] for number in numbers]
        rows = gallery.read(np.array(numbers))
        splits = [_names(content, "split") for content in contents]
        tiers = [_names(content, "tier") for content in contents]
        across = "split again with `--near-groups near_groups.csv`, which keeps them together"
        other = "look at them: if they show the same work, decide on one tier"
        found = [
            _near("near-across-splits", contents, rows, splits, across),
            _near("near-other-tier", contents, rows, tiers, other),
        ]
        if found == [None, None]:
            each = [[str(i)] for i in range(len(contents))]
            harmless = "look at them: of one work, keep the best picture"
            found.append(_near("near", contents, rows, each, harmless))
        findings += [finding for finding in found if finding is not None]
    return findings


def _near(
    kind: str,
    contents: Sequence[pd.DataFrame],
    rows: FloatArray,
    labels: Sequence[Sequence[str]],
    advice: str,
) -> Finding | None:
    """A finding that names the closest two contents with different labels; None without such."""
    if len({name for names in labels for name in names}) < 2:
        return None
    one, two, cosine = closest_pair(rows, labels)
    if one == two:
        return None  # copies of one content have different labels, and no other content has any
    names = " and ".join(contents[i]["image_id"].iloc[0] for i in (one, two))
    value = f"cosine {cosine:.3f} ({names})"
    return Finding(kind, joined(contents), advice, value, cosine)


def closest_pair(rows: FloatArray, labels: Sequence[Sequence[str]]) -> tuple[int, int, float]:
    """The closest two rows that do not have the one same label: (row, row, cosine).

    Args:
        rows: [n, D] unit vectors.
        labels: per row the labels it has; without any it is in no pair.
    """
    codes: dict[tuple[str, ...], int] = {}
    code = np.array([codes.setdefault(tuple(names), len(codes)) for names in labels])
    mixed = np.array([len(names) > 1 for names in labels])
    known = np.array([len(names) > 0 for names in labels])
    best = (0, 0, -np.inf)
    for start in range(0, len(rows), _BLOCK):
        here = slice(start, start + _BLOCK)
        cosines = rows[here] @ rows.T
        differ = (code[here, None] != code) | mixed[here, None]
        differ &= known[here, None] & known
        differ[np.arange(len(cosines)), start + np.arange(len(cosines))] = False
        cosines[~differ] = -np.inf
        one, two = np.unravel_index(int(cosines.argmax()), cosines.shape)
        if cosines[one, two] > best[2]:
            best = (start + int(one), int(two), float(cosines[one, two]))
    return best


def _several(images: pd.DataFrame, column: str) -> Iterator[pd.DataFrame]:
    """The images of each value that several of them have."""
    return (same for _, same in images.groupby(column, sort=False) if len(same) > 1)


def _names(images: pd.DataFrame, column: str) -> list[str]:
    return sorted({name for name in or_none(images[column]) if name is not None})


def contradictions(scores: NDArray[np.float64], tiers: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n]: the share, 0 to 1, of comparisons with images of other tiers that each image's score gets wrong.

    Wrong is a score above that of an image of a better tier, or below that of a worse one; equal scores
    are half wrong. NaN where all images have one tier.

    Args:
        scores: [n], higher is better.
        tiers: [n], 0 is the best.
    """
    right, compared = PairCounter(scores, tiers).by_image()
    return 1 - ratio(right, compared)


def disagreements(held_out: GradedImages, images: pd.DataFrame, share: float) -> list[Finding]:
    """Findings about images that are wrong in at least ``share`` of their comparisons.

    Args:
        held_out: images with scores by heads that had not seen them.
        images: what is known of the images; those with a held-out score are found by name.
        share: 0 to 1.
    """
    place = {image_id: i for i, image_id in enumerate(images["image_id"])}
    wrong = contradictions(held_out.scores, held_out.order)
    guessed = tiers_by_quota(held_out.scores, held_out.order)
    findings = []
    for i, image_id in enumerate(held_out.ids):
        if image_id not in place or not wrong[i] >= share:
            continue  # taken out of the data
        image = images.iloc[[place[image_id]]]
        score, source = f"{held_out.scores[i]:.4g}", held_out.held_out_by
        if held_out.has_tiers:
            same = image["tier"].iloc[0] == held_out.table["tier"].iloc[i]
            value = (
                f"contradicts {wrong[i]:.0%} of the comparisons with other tiers; by its {source} score "
                f"({score}) it would be {held_out.tiers[int(guessed[i])]}"
            )
        else:
            same = image["tier_score"].iloc[0] == held_out.tier_scores[i]
            value = (
                f"contradicts {wrong[i]:.0%} of the comparisons with other grades (tier_score "
                f"{held_out.tier_scores[i]:g}, {source} score {score})"
            )
        if not same:
            continue  # graded anew since
        advice = "look at it: is the grade right, and is it the right file?"
        findings.append(Finding("disagreement", image, advice, value, float(wrong[i])))
    return findings


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        findings: gravest first.
        checked: what was looked at, and what could not be and why; one sentence each.
        files: what was written.
        failed: findings that make it end with status 1.
    """

    findings: list[Finding]
    checked: list[str]
    files: list[Path]
    failed: list[Finding]


def audit(
    config: Config,
    *,
    data: Path | None = None,
    run: Path | None = None,
    pairs: Sequence[Path] = (),
    out: Path = Path(),
) -> Audit:
    """Look for what makes scores untrue, and write audit.csv and near_groups.csv.

    Args:
        config: the sections audit, embed (cache folder) and train (folder of the runs) are used.
        data: the embedded folder or CSV file; None takes the newest one with grades, else the newest.
        run: the run whose splits and held-out scores are looked at; None takes the newest of the data.
        pairs: CSV files of judged pairs, to look for cycles in.
        out: folder for the files.

    Raises:
        RunNotFoundError: the data is not embedded, or there is no such run.
        DataError: the data's CSV file or the pairs file is faulty.
        ConfigError: ``audit.fail_on`` has an unknown word.
    """
    failing = failing_kinds(config.audit.fail_on)
    cache_dir = Path(config.embed.cache_dir)
    graded = [d for d in find_datasets(cache_dir) if d.info["graded"]] if data is None else []
    dataset = graded[0] if graded else newest_dataset(cache_dir, data)
    log.info("Data set %s", shown(dataset.source))
    trained = run_of(dataset, Path(config.train.output_dir), run)
    images, findings = look_at(dataset, cache_dir)
    images, splits_in = with_splits(images, dataset, trained)
    known_grades = int((images["tier"].notna() | images["tier_score"].notna()).sum())
    grades = f"{known_grades} graded" if known_grades else "no grades"
    grades = "all graded" if known_grades == len(images) else grades
    checked = [
        f"{counted(len(images), 'image')} with features, {grades}",
        "Splits: not looked at, as there are none yet. `mirip-fast train --head-only` or "
        "`mirip-fast split` makes them"
        if splits_in is None
        else f"Splits: {shown(Path(splits_in)) if ',' not in splits_in else splits_in}",
    ]
    findings += copies(images)
    findings += straddling_groups(images)
    near = list[dict[str, str]]()
    if len(images):
        gallery = open_gallery(images, stores_of([dataset]), base_series(dataset))
        groups = [g for g in gallery.groups(config.audit.near_cosine) if len(g) > 1]
        findings += near_duplicates(gallery, groups, images)
        near = _near_rows(gallery, groups, images)
        checked.append(
            f"Near duplicates: {counted(len(groups), 'group')} at a cosine of "
            f"{config.audit.near_cosine:g} and more ({base_series(dataset)})"
        )
    found, said = _scores(dataset, trained, images, config.audit.disagreement)
    findings, checked = findings + found, [*checked, said]
    if pairs:
        zero, separator = config.train.pairs_zero, config.data.separator
        root = path_of(dataset.info["root"])
        found, judged = contradictory_judgements(
            pairs,
            zero=zero,
            separator=separator,
            images=dataset.images(),
            places=[root, root / "images"],
        )
        findings, checked = findings + found, [*checked, *judged]
    kinds = list(KINDS)
    findings.sort(key=lambda finding: (kinds.index(finding.kind), -finding.weight))
    files = [out / AUDIT_FILE, out / NEAR_GROUPS_FILE]
    write_findings(files[0], findings)
    write_csv(files[1], (GROUP, ID, "path"), near)
    failed = [finding for finding in findings if finding.kind in failing]
    return Audit(findings, checked, files, failed)


def _near_rows(
    gallery: Gallery, groups: Sequence[Sequence[int]], images: pd.DataFrame
) -> list[dict[str, str]]:
    """The rows of near_groups.csv: every image that has near duplicates."""
    place = {gallery.hashes[n]: i for i, numbers in enumerate(groups, start=1) for n in numbers}
    near = images.assign(place=images["sha256"].map(place)).dropna(subset="place")
    near = near.sort_values(["place", "image_id"])
    rows = zip(near["place"], near["image_id"], near["file"], strict=True)
    return [{GROUP: f"near-{i:.0f}", ID: name, "path": file} for i, name, file in rows]


def _scores(
    dataset: Dataset, run: Run | None, images: pd.DataFrame, share: float
) -> tuple[list[Finding], str]:
    """Findings from held-out scores, and a sentence about where these come from."""
    tiers = dataset.info["tiers"]
    held_out = None if run is None else load_held_out(run.path, tiers)
    if run is None or held_out is None or not len(held_out):
        missing = "there is no run" if run is None else f"{shown(run.path)} has none"
        return [], (
            f"Scores against tiers: not looked at, as {missing}. `mirip-fast train --head-only "
            "--folds 5` gives every image a held-out score"
        )
    if (held_out.order < 0).any():
        return (
            [],
            "Scores against tiers: not looked at, as the run learned from works without grades",
        )
    found = disagreements(held_out, images, share)
    return found, (
        f"Scores against tiers: {held_out.held_out_by} scores of {counted(len(held_out), 'image')} "
        f"from {shown(run.path)}"
    )


def contradictory_judgements(
    pairs: Sequence[Path],
    *,
    zero: str | None = None,
    separator: str | None = None,
    images: pd.DataFrame | None = None,
    places: Sequence[Path] = (),
) -> tuple[list[Finding], list[str]]:
    """Findings about judgements that cannot all be right, such as a > b, b > c, c > a, and sentences.

    Images are joined by cycles in a strongly connected component; where there is none, an order of the
    images agrees with every judgement. An image preferred to itself is a cycle of one.

    Args:
        pairs: CSV files of judged pairs; ties are counted, no more.
        zero: what the label 0 means, see :func:`mirip_fast.data.pair_files.read_pairs`.
        separator: between cells; None finds it out.
        images, places: what the names are of, as for :func:`mirip_fast.data.pair_files.read_pairs`; names
            that mean none of them are told. None: any name will do.

    Returns:
        The shortest cycles, at most five of a component, the largest component first.

    Raises:
        DataError: a file is unreadable, or rows or columns are faulty (all faults in one message).
    """
    import networkx as nx
    import pandas as pd

    graph = nx.DiGraph()  # better → worse; each edge with the row that says so first
    edges, rows = list[tuple[str, str]](), list[int | str]()
    ties, unknown = 0, list[str]()
    for path in dict.fromkeys(pairs):
        table, labels, problems = read_verdicts(path, zero, separator)
        problems.raise_if_any()
        if images is not None:
            unknown += unknown_works(path, table.cells, images, places)
        ties += labels.count(0)
        names = (map(_image_name, table.cells[column]) for column in (FIRST, SECOND))
        for one, other, label, row in zip(*names, labels, table.cells.index, strict=True):
            if label:
                edges.append((one, other) if label > 0 else (other, one))
                rows.append(row if len(pairs) == 1 else f"{shown(path)}:{row}")
                if edges[-1] not in graph.edges:
                    graph.add_edge(*edges[-1], row=rows[-1])
    component = {
        image: number
        for number, images in enumerate(nx.strongly_connected_components(graph))
        for image in images
    }
    graph.remove_edges_from([(a, b) for a, b in graph.edges if component[a] != component[b]])
    inside: dict[int, list[int]] = {}  # component → numbers of the judgements among its images
    for number, edge in enumerate(edges):
        if edge in graph.edges:
            inside.setdefault(component[edge[0]], []).append(number)
    joined_by_cycles = [
        (sorted({image for number in numbers for image in edges[number]}), numbers)
        for numbers in inside.values()
    ]
    findings = [
        Finding(
            "cycle",
            pd.DataFrame(
                {
                    "image_id": cycle,
                    "row": [
                        graph.edges[edge]["row"]
                        for edge in zip(cycle, (*cycle[1:], cycle[0]), strict=True)
                    ],
                }
            ),
            advice="judge these pairs again, or take one of the rows out",
            value=(
                f"one of the shortest cycles among {counted(len(images), 'image')} and "
                f"{counted(len(numbers), 'judgement')} that no order agrees with"
            ),
            weight=1 / len(cycle),
        )
        for images, numbers in sorted(joined_by_cycles, key=lambda one: (-len(one[0]), one[1]))
        for cycle in _shortest_cycles(graph, images)
    ]
    said = (
        f"Preferences: {counted(len(edges), 'judgement')} and {counted(ties, 'tie')} in "
        f"{', '.join(map(shown, pairs))}; {sum(map(len, inside.values()))} of them lie on cycles, in "
        f"{counted(len(inside), 'strongly connected component')}"
    )
    return findings, [said, *unknown]


def _image_name(text: str) -> str:
    """One spelling of a file name: ``./a\\b.png`` is ``a/b.png``, accents and Korean are composed."""
    return posixpath.normpath(nfc(text.strip().replace("\\", "/")))


def _shortest_cycles(graph: DiGraph[str], images: Sequence[str]) -> list[tuple[str, ...]]:
    """At most five cycles of one component, shortest first; each begins at its first image by name.

    The shortest ways from every image and back over each judgement that leads there; of a larger component
    from its first thousand, or from fewer where all cycles are long. Once five cycles are known, no longer
    one is looked for.
    """
    import networkx as nx

    found, longest, reached = set[tuple[str, ...]](), len(images), 0
    for start in images[:_STARTS]:
        if reached > _REACHED:
            break
        before = dict(nx.bfs_predecessors(graph, start, longest - 1))
        reached += len(before)
        for last in graph.predecessors(start):
            if last == start or last in before:
                way = [last]
                while way[-1] != start:
                    way.append(before[way[-1]])
                least = way.index(min(way)) + 1  # it is last, as the way is backwards
                found.add((*reversed(way[:least]), *reversed(way[least:])))
        if len(found) >= _CYCLES:
            found = set(sorted(found, key=lambda cycle: (len(cycle), cycle))[:_CYCLES])
            longest = max(map(len, found))
    return sorted(found, key=lambda cycle: (len(cycle), cycle))


_NAMES = 4  # images named per finding
_ROWS = 20  # rows named per cycle; audit.csv has all


def audit_text(audit: Audit, top: int) -> str:
    """What was checked, a table of the kinds found, and the ``top`` first findings of each kind."""
    parts = ["\n".join(f"- {sentence}" for sentence in audit.checked)]
    if not audit.findings:
        return "\n\n".join([*parts, "Nothing was found fault with."])
    found = Counter(finding.kind for finding in audit.findings)
    rows = [
        (tr(severity), kind, found[kind], tr(meaning))
        for kind, (severity, meaning) in KINDS.items()
        if found[kind]
    ]
    parts.append(format_table(("severity", "kind", "found", "meaning"), rows, "llrl"))
    for _, kind, count, meaning in rows:
        if top:
            shown = [f for f in audit.findings if f.kind == kind][:top]
            lines = [f"{meaning.capitalize()}:", *(_line(finding) for finding in shown)]
            if count > top:
                lines.append(f"  … and {count - top} more")
            parts.append("\n".join([*lines, f"  → {shown[0].advice}"]))
    return "\n\n".join(parts)


def verdict(audit: Audit) -> str:
    """The last line: whether the audit failed, and over what."""
    if not audit.failed:
        return "No finding of the kinds that --fail-on names."
    found = Counter(finding.kind for finding in audit.failed)
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.items())
    return f"Failed: {counted(len(audit.failed), 'finding')} of the kinds that --fail-on names ({kinds})."


def _line(finding: Finding) -> str:
    names = finding.each("image_id")
    text = " > ".join([*names[:_NAMES], *(["…"] if len(names) > _NAMES else []), names[0]])
    rows = finding.each("row")
    text += f" (rows {', '.join([*rows[:_ROWS], *(['…'] if len(rows) > _ROWS else [])])})"
    if finding.kind != "cycle":
        known = [
            finding.each("tier") or ["-"] * len(names),
            finding.each("split") or ["-"] * len(names),
        ]
        named = [
            f"{name} ({', '.join(about)})" if (about := [v for v in values if v != "-"]) else name
            for name, *values in zip(names, *known, strict=True)
        ]
        text = ", ".join(named[:_NAMES])
        text += f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return printable(f"  {text}" + (f": {finding.value}" if finding.value else ""))
