"""Copies in an audit: equal files, near duplicates and groups, across splits and in different tiers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from mirip_fast.data.csv_reader import counted
from mirip_fast.features.gallery import Gallery
from mirip_fast.features.neighbours import FloatArray
from mirip_fast.ranking.audit_images import AuditImage, finding_about
from mirip_fast.ranking.findings import Finding

_BLOCK = 1024


def copies(images: Sequence[AuditImage]) -> list[Finding]:
    """Files with the same bytes under different names."""
    findings = []
    for same in _by(images, lambda image: image.sha256):
        splits, tiers = _split_names(same), _tier_names(same)
        value = f"{counted(len(same), 'file')} with the same bytes"
        if len(splits) > 1:
            advice = (
                "split again with `mirip-fast split` or `train`, which keep equal files together"
            )
            findings.append(finding_about("copy-across-splits", same, advice, value, len(same)))
        if len(tiers) > 1:
            advice = "decide on one tier, and keep one of them"
            findings.append(finding_about("copy-other-tier", same, advice, value, len(same)))
        if len(splits) < 2 and len(tiers) < 2:
            advice = "keep one of them, or it counts more than once"
            findings.append(finding_about("copy", same, advice, value, len(same)))
    return findings


def straddling_groups(images: Sequence[AuditImage]) -> list[Finding]:
    """Values of the group column whose images are in different splits."""
    findings = []
    grouped = [image for image in images if image.record.group is not None]
    for members in _by(grouped, lambda image: image.record.group):
        splits = _split_names(members)
        if len(splits) > 1:
            named = ", ".join(f"{name} {sum(i.split == name for i in members)}" for name in splits)
            advice = "split again with `mirip-fast split` or `train`, which keep groups together"
            value = f"group {members[0].record.group!r}: {named}"
            found = finding_about("group-across-splits", members, advice, value, len(members))
            findings.append(found)
    return findings


def near_duplicates(
    gallery: Gallery, groups: Iterable[Sequence[int]], images: Sequence[AuditImage]
) -> list[Finding]:
    """What is wrong with groups of near duplicates.

    Args:
        gallery: the works.
        groups: numbers of contents, from :func:`mirip_fast.features.gallery.near_groups`.
        images: the same works as the audit knows them.
    """
    by_hash: dict[bytes, list[AuditImage]] = defaultdict(list)
    for image in images:
        by_hash[image.sha256].append(image)
    place = {sha: i for i, sha in enumerate(by_hash)}  # the order of the data
    findings = []
    for group in groups:
        numbers = sorted(group, key=lambda number: place[gallery.hashes[number]])
        contents = [by_hash[gallery.hashes[number]] for number in numbers]
        members = [image for content in contents for image in content]
        rows = gallery.vectors.read(np.array(numbers))
        splits = [_split_names(content) for content in contents]
        tiers = [_tier_names(content) for content in contents]
        across = "split again with `--near-groups near_groups.csv`, which keeps them together"
        other = "look at them: if they show the same work, decide on one tier"
        found = [
            _near("near-across-splits", members, contents, rows, splits, across),
            _near("near-other-tier", members, contents, rows, tiers, other),
        ]
        if found == [None, None]:
            each = [[str(i)] for i in range(len(contents))]
            harmless = "look at them: of one work, keep the best picture"
            found.append(_near("near", members, contents, rows, each, harmless))
        findings += [finding for finding in found if finding is not None]
    return findings


def _near(
    kind: str,
    members: Sequence[AuditImage],
    contents: Sequence[Sequence[AuditImage]],
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
    names = " and ".join(contents[i][0].record.image_id for i in (one, two))
    value = f"cosine {cosine:.3f} ({names})"
    return finding_about(kind, members, advice, value, cosine)


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


def _by(
    images: Sequence[AuditImage], key: Callable[[AuditImage], Hashable]
) -> Iterable[list[AuditImage]]:
    found: dict[Hashable, list[AuditImage]] = defaultdict(list)
    for image in images:
        found[key(image)].append(image)
    return [members for members in found.values() if len(members) > 1]


def _split_names(images: Iterable[AuditImage]) -> list[str]:
    return sorted({image.split for image in images if image.split is not None})


def _tier_names(images: Iterable[AuditImage]) -> list[str]:
    return sorted({image.tier for image in images if image.tier is not None})
