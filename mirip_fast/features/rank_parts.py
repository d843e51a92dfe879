"""The ledger of a distributed run: each rank writes its part, the last to end puts them together.

No rank waits for another. Each leaves ``ranks/<run>/rank-01.json`` beside the data set's ledger when it is
done with its share, and looks whether all parts are there. Whoever finds them writes the ledger of the
whole; where two end at the same moment, both write the same. After a rank was killed there is no new
ledger: the next run, of any number of ranks, computes what is missing and writes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mirip_fast.features.outcomes import Outcome
from mirip_fast.files import read_file, write_text
from mirip_fast.runtime import Ranks

_FOLDER = "ranks"


class RankParts:
    """The parts of one run's ledger.

    Args:
        folder: the data set's folder in the cache.
        ranks: which part is this process's.
        paths: all inputs of the run, of every rank.
    """

    def __init__(self, folder: Path, ranks: Ranks, paths: Sequence[Path]):
        digest = hashlib.sha256(ranks.run_id.encode("utf-8", "surrogateescape"))
        for path in paths:
            digest.update(b"\0" + str(path).encode("utf-8", "surrogateescape"))
        self._all = folder / _FOLDER
        self._folder = self._all / digest.hexdigest()[:16]
        self._ranks, self._n = ranks, len(paths)
        self.mine = [i for i, path in enumerate(paths) if ranks.takes(path)]

    def begin(self) -> None:
        """Forget what earlier runs left: this rank's part, and parts of other inputs."""
        self._file(self._ranks.rank).unlink(missing_ok=True)
        for other in self._all.glob("*"):
            if other != self._folder and self._ranks.rank == 0:
                shutil.rmtree(other, ignore_errors=True)

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Write this rank's part.

        Args:
            outcomes: of the inputs :attr:`mine`, in that order.
        """
        lines = [
            json.dumps([i, o.status, o.sha256.hex() if o.sha256 else None, o.reason])
            for i, o in zip(self.mine, outcomes, strict=True)
        ]
        write_text(self._file(self._ranks.rank), "\n".join(lines) + "\n")

    def whole(self) -> list[Outcome] | None:
        """The outcome of every input, in order; None while a rank has not written its part."""
        found: dict[int, Outcome] = {}
        try:
            for rank in range(self._ranks.size):
                for line in read_file(self._file(rank)).decode("utf-8").splitlines():
                    index, status, sha, reason = json.loads(line)
                    found[index] = Outcome(status, bytes.fromhex(sha) if sha else None, reason)
        except (FileNotFoundError, ValueError):
            return None
        if sorted(found) != list(range(self._n)):
            return None
        return _joined([found[i] for i in range(self._n)])

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:02d}.json"


def _joined(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One ledger: a picture that two ranks both met counts once."""
    computed = {o.sha256 for o in outcomes if o.status == "embedded"}
    seen: set[bytes | None] = set()
    result = []
    for outcome in outcomes:
        status = outcome.status
        if status != "failed":
            first = "embedded" if outcome.sha256 in computed else "present"
            status = "duplicate" if outcome.sha256 in seen else first
            seen.add(outcome.sha256)
        result.append(Outcome(status, outcome.sha256, outcome.reason))
    return result
