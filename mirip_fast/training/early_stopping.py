"""When to stop: no better validation accuracy for a number of epochs."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class EarlyStopping:
    """Follows the best value of a metric that should grow.

    Attributes:
        patience: epochs without a better value before stopping; 0 never stops.
        min_delta: smallest gain that resets the count.
        best: the best value so far, and since when it is (``best_epoch``).
        waited: epochs since a gain of at least ``min_delta``.
    """

    patience: int
    min_delta: float = 0.0
    best: float = float("-inf")
    best_epoch: int = 0
    waited: int = 0
    _mark: float = float("-inf")  # the value that the next gain is measured from

    def update(self, value: float, epoch: int) -> bool:
        """Take in the epoch's value; returns whether it is the best so far."""
        if value >= self._mark + self.min_delta and value > self._mark:
            self._mark = value
            self.waited = 0
        else:
            self.waited += 1
        if value > self.best:
            self.best, self.best_epoch = value, epoch
            return True
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self) -> dict[str, float]:
        """What resuming needs, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`; patience and min_delta stay as set now."""
        self.best, self._mark = state["best"], state["_mark"]
        self.best_epoch, self.waited = int(state["best_epoch"]), int(state["waited"])
