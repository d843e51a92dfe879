"""XMP sidecars: a work's rank as stars and keywords, which Lightroom, Bridge, darktable and exiftool read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from mirip_fast.data.formats import split_page
from mirip_fast.errors import DataError
from mirip_fast.files import write_text
from mirip_fast.portfolio.ranking import of_tiers
from mirip_fast.portfolio.xlsx import legal_text
from mirip_fast.text import nfc

if TYPE_CHECKING:
    import pandas as pd

    from mirip_fast.portfolio.rank import RankDone

BESIDE = "beside"
_OURS = "mirip-fast"
_SIDECAR = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="mirip-fast">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmp:Rating="{stars}">{keywords}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
_KEYWORDS = """
   <dc:subject><rdf:Bag><rdf:li>tier {tier}</rdf:li></rdf:Bag></dc:subject>
   <lr:hierarchicalSubject><rdf:Bag><rdf:li>tier|tier {below}</rdf:li></rdf:Bag></lr:hierarchicalSubject>"""


def stars(ranking: pd.DataFrame) -> list[int]:
    """[n] stars: 5 for the best tier, 1 for the worst; without tiers 5 to 1 for a fifth of the works each."""
    tiers = list(of_tiers(ranking, "p"))
    if "tier" in ranking and len(tiers) > 1:
        return [round(5 - 4 * tiers.index(tier) / (len(tiers) - 1)) for tier in ranking["tier"]]
    return [5 - int(5 * (rank - 1) / len(ranking)) for rank in ranking["rank"]]


def write_sidecars(done: RankDone, where: str) -> tuple[int, list[str]]:
    """Write a sidecar ``name.xmp`` per work, ``name.jpg.xmp`` where two works differ in their ending alone.

    A PDF has one: that of its best page.

    Args:
        done: the ranking.
        where: ``beside`` for the pictures' own folders, else a folder, in which they lie as below the ranked
            one.

    Returns:
        How many were written, and the sidecars that were there already, from another program: they are left
        as they are.

    Raises:
        DataError: ``beside`` works that lie in a tar or at an address.
        DiskFullError: there is no room.
        OSError: a sidecar cannot be written.
    """
    # The best page of a PDF comes first, and is the one that stays.
    works = done.ranking.assign(file=[split_page(name)[0] for name in done.ranking["file"]])
    works = works.assign(stars=stars(works)).drop_duplicates("file")
    names = works["file"].tolist()
    stems = Counter(nfc(os.path.splitext(name)[0]).casefold() for name in names)  # noqa: PTH122
    top = done.root if where == BESIDE else Path(where)
    if where == BESIDE and any(not (done.root / name).is_file() for name in names):
        raise DataError(
            "--xmp beside: works in a tar or at an address have no place beside them; name a folder"
        )
    tiers = works["tier"] if "tier" in works else [None] * len(names)
    kept, written = [], 0
    for name, tier, rating in zip(names, tiers, works["stars"], strict=True):
        stem = os.path.splitext(name)[0]  # noqa: PTH122
        alone = stems[nfc(stem).casefold()] == 1
        path = top / ((stem if alone else name).replace(f"..{os.sep}", f"_{os.sep}") + ".xmp")
        if path.exists() and f'xmptk="{_OURS}"' not in path.read_text("utf-8", "replace"):
            kept.append(str(path))
            continue
        text, keywords = escape(legal_text(str(tier))), ""
        if tier is not None:
            keywords = _KEYWORDS.format(tier=text, below=text.replace("|", "/"))
        write_text(path, _SIDECAR.format(stars=rating, keywords=keywords))
        written += 1
    return written, kept
