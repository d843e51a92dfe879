"""`audit`: what is wrong with a data set before anyone trusts a score that was learned from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.cycles import Component, find_components, read_judgements
from mirip_fast.data.near_groups import NEAR_GROUPS_FILE, write_near_groups
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.gallery import (
    Gallery,
    Work,
    base_series,
    near_groups,
    open_gallery,
    reference_dataset,
    stores_of,
)
from mirip_fast.features.neighbours import open_index
from mirip_fast.ranking.audit_copies import copies, near_duplicates, straddling_groups
from mirip_fast.ranking.audit_images import AuditImage, look_at, run_of, with_splits
from mirip_fast.ranking.audit_scores import disagreements
from mirip_fast.ranking.findings import (
    AUDIT_FILE,
    Finding,
    failing_kinds,
    in_order,
    write_findings,
)
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)


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
    dataset = _dataset(cache_dir, data)
    log.info("Data set %s", shown(dataset.source))
    trained = run_of(dataset, Path(config.train.output_dir), run)
    images, findings = look_at(dataset, cache_dir)
    images, splits_in = with_splits(images, dataset, trained)
    checked = [_about_images(images), _about_splits(splits_in)]
    findings += copies(images)
    findings += straddling_groups(images)
    listed: list[tuple[str, str, Path]] = []
    if images:
        gallery = _gallery(dataset, images)
        index = open_index(gallery.vectors, gallery.folder, gallery.series)
        groups = [g for g in near_groups(gallery, config.audit.near_cosine, index) if len(g) > 1]
        findings += near_duplicates(gallery, groups, images)
        listed = _near_rows(gallery, groups, images)
        checked.append(
            f"Near duplicates: {counted(len(groups), 'group')} at a cosine of "
            f"{config.audit.near_cosine:g} and more ({gallery.series})"
        )
    found, said = _scores(dataset, trained, images, config.audit.disagreement)
    findings, checked = findings + found, [*checked, said]
    if pairs:
        found, said = _cycles(pairs, config)
        findings, checked = findings + found, [*checked, said]
    findings = in_order(findings)
    files = [out / AUDIT_FILE, out / NEAR_GROUPS_FILE]
    write_findings(files[0], findings)
    write_near_groups(files[1], listed)
    failed = [finding for finding in findings if finding.kind in failing]
    return Audit(findings, checked, files, failed)


def _dataset(cache_dir: Path, data: Path | None) -> Dataset:
    graded = [d for d in find_datasets(cache_dir) if d.info["graded"]] if data is None else []
    return graded[0] if graded else reference_dataset(cache_dir, data)


def _gallery(dataset: Dataset, images: Sequence[AuditImage]) -> Gallery:
    works = [Work(i.record.path, i.record.image_id, i.sha256, i.tier) for i in images]
    return open_gallery(works, stores_of([dataset]), base_series(dataset))


def _near_rows(
    gallery: Gallery, groups: Sequence[Sequence[int]], images: Sequence[AuditImage]
) -> list[tuple[str, str, Path]]:
    group_of = {
        gallery.hashes[number]: f"near-{place}"
        for place, numbers in enumerate(groups, start=1)
        for number in numbers
    }
    rows = [
        (group_of[image.sha256], image.record.image_id, image.record.path)
        for image in images
        if image.sha256 in group_of
    ]
    return sorted(rows, key=lambda row: (int(row[0].removeprefix("near-")), row[1]))


def _about_images(images: Sequence[AuditImage]) -> str:
    graded = sum(image.tier is not None or image.record.tier_score is not None for image in images)
    grades = (
        "all graded" if graded == len(images) else f"{graded} graded" if graded else "no grades"
    )
    return f"{counted(len(images), 'image')} with features, {grades}"


def _about_splits(where: str | None) -> str:
    if where is None:
        return (
            "Splits: not looked at, as there are none yet. `mirip-fast train --head-only` or "
            "`mirip-fast split` makes them"
        )
    return f"Splits: {shown(Path(where)) if ',' not in where else where}"


def _scores(
    dataset: Dataset, run: Run | None, images: Sequence[AuditImage], share: float
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
    found = disagreements(held_out, tiers, images, share)
    return found, (
        f"Scores against tiers: {held_out.source} scores of {counted(len(held_out), 'image')} "
        f"from {shown(run.path)}"
    )


def _cycles(pairs: Sequence[Path], config: Config) -> tuple[list[Finding], str]:
    judgements, ties = [], 0
    where: list[int | str] = []  # the row of each judgement, with its file where there are several
    for path in dict.fromkeys(pairs):
        found, tied = read_judgements(
            path, zero=config.train.pairs_zero, separator=config.data.separator
        )
        ties += tied
        for judgement in found:
            judgements.append(replace(judgement, row=len(where)))
            where.append(judgement.row if len(pairs) == 1 else f"{shown(path)}:{judgement.row}")
    components = find_components(judgements)
    findings = [
        Finding(
            "cycle",
            images=cycle.images,
            advice="judge these pairs again, or take one of the rows out",
            rows=[where[row] for row in cycle.rows],
            value=_component_text(component),
            weight=1 / len(cycle.images),
        )
        for component in components
        for cycle in component.cycles
    ]
    inside = sum(len(component.rows) for component in components)
    return findings, (
        f"Preferences: {counted(len(judgements), 'judgement')} and {counted(ties, 'tie')} in "
        f"{', '.join(map(shown, pairs))}; {inside} of them lie on cycles, in "
        f"{counted(len(components), 'strongly connected component')}"
    )


def _component_text(component: Component) -> str:
    return (
        f"one of the shortest cycles among {counted(len(component.images), 'image')} and "
        f"{counted(len(component.rows), 'judgement')} that no order agrees with"
    )
