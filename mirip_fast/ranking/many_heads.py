"""Many heads trained together, as one stacked computation: for bootstrap heads and sweeps.

Every head has its own images (by index into common rows; an image that is there twice counts twice), its own
validation images, seed, learning rate, schedule, weight decay, dropout, loss and early stopping; heads of one
stack share the features, the widths and the batch size. A head ends with the weights that
:class:`mirip_fast.ranking.fit.HeadFit` gives the same images and settings, up to rounding (and, above 1,024
images per batch, up to other dropout noise), and does not depend on what else is in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirip_fast.config import Config, HeadConfig
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss
from mirip_fast.models.stacked_head import StackedHeads
from mirip_fast.models.stacked_loss import stacked_pair_loss
from mirip_fast.ranking.device_rows import DeviceRows
from mirip_fast.ranking.head_tasks import HeadTask, Index, Runner, TrainedHead
from mirip_fast.ranking.objective import ALL
from mirip_fast.ranking.rows import Rows
from mirip_fast.ranking.stacked_optim import Recipe, StackedOptimizer
from mirip_fast.runtime import cpu_threads, set_seed

#: Validation numbers gathered at a time: 256 MB of float32.
_GATHERED = 1 << 26
#: Heads that are done go along until they are this share of the stack: leaving them out copies it.
_IDLE_SHARE = 0.2


def stackable(config: Config) -> bool:
    """Whether a stack can train with these settings: whole batches of images, one per step."""
    train = config.train
    averaged = train.ema_decay > 0 or train.swa_start > 0
    return train.pairs == ALL and train.gradient_accumulation_steps == 1 and not averaged


def heads_per_stack(input_dim: int, config: HeadConfig, device: torch.device) -> int:
    """How many heads are best trained together on a device.

    On a CPU a stack is quickest while its weights and what the optimizer keeps of them are near the
    caches; measured, one head of 37,000 numbers took 4 times as long alone as in a stack of 25, one of
    670,000 1.4 times as long as in a stack of 6. A GPU takes as many as its memory has room for.
    """
    numbers = sum(p.numel() for p in RankingHead(input_dim, config).parameters())
    most = 4_000_000 if device.type == "cpu" else 200_000_000
    return max(1, most // numbers)


class ManyHeads:
    """A stack of heads and their data; :meth:`run` trains it.

    Args:
        rows: all images that any head learns from.
        tasks: one per head, see :func:`stackable`.
        device: where to train.
        dtype: of the computation; float64 serves tests.
    """

    def __init__(
        self,
        rows: Rows,
        tasks: Sequence[HeadTask],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        if device.type == "mps":  # which has no float64, for losses and norms
            device = torch.device("cpu")
        self.rows, self.device, self.dtype = DeviceRows.of(rows, device), device, dtype
        # Heads of one recipe stand side by side: one optimizer steps them all.
        order = sorted(range(len(tasks)), key=lambda i: repr(_recipe(tasks[i])))
        self._runners = [Runner(i, tasks[i], rows) for i in order]
        states = []
        for runner in self._runners:
            set_seed(runner.task.config.train.seed)
            head = RankingHead(rows.input_dim, runner.task.config.head, rows.attention)
            states.append(head.state_dict())
        self.heads = StackedHeads(
            [{k: v.to(device=device, dtype=dtype) for k, v in state.items()} for state in states],
            [runner.task.config.head.projector_dropout for runner in self._runners],
        )
        self.optimizer = StackedOptimizer(
            self.heads, [_recipe(runner.task) for runner in self._runners]
        )
        self._noise = [torch.Generator(device) for _ in self._runners]
        self.epoch = 0

    def run(self, on_epoch: Callable[[int, int], None] = lambda *_: None) -> list[TrainedHead]:
        """Train every head to its end.

        Args:
            on_epoch: called after every epoch with its number and the number of heads still at work.

        Returns:
            The heads, in the order of the tasks.
        """
        # One CPU thread, as for small batches of a single head: on a busy machine threads that wait for
        # each other cost eight times what they gain, and other core counts give the same numbers.
        with cpu_threads(1 if self.device.type == "cpu" else None):
            return self._run(on_epoch)

    def _run(self, on_epoch: Callable[[int, int], None]) -> list[TrainedHead]:
        done: dict[int, TrainedHead] = {}
        working = len(self._runners)
        while working:
            self.epoch += 1
            losses = self._train_epoch()
            self._judge(torch.isfinite(losses).tolist())
            finished = [runner.finished for runner in self._runners]
            working = finished.count(False)
            if not working or finished.count(True) >= _IDLE_SHARE * len(finished):
                done.update((r.place, r.result()) for r in self._runners if r.finished)
                self._keep([i for i, over in enumerate(finished) if not over])
            on_epoch(self.epoch, working)
        return [done[place] for place in sorted(done)]

    def _train_epoch(self) -> Tensor:
        """One pass of every head over its images; returns the [H] summed losses."""
        batches = [runner.batches(self.epoch) for runner in self._runners]
        rngs = [batch.rng for batch in batches]
        for generator, runner in zip(self._noise, self._runners, strict=True):
            generator.manual_seed(runner.task.config.train.seed * 1_000_003 + self.epoch)
        total = torch.zeros(len(self.heads), dtype=torch.float64, device=self.device)
        for step in range(max(len(batch.index) for batch in batches)):
            chosen = [
                batch.index[step] if step < len(batch.index) else np.empty(0, np.int64)
                for batch in batches
            ]
            losses = self._losses(chosen, rngs)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step([len(index) > 0 for index in chosen])
            total += losses.detach()
        return total

    def _losses(self, chosen: Sequence[Index], rngs: Sequence[np.random.Generator]) -> Tensor:
        """[H] losses of one batch per head."""
        counts = [len(index) for index in chosen]
        index = torch.from_numpy(_padded(chosen, max(counts))).to(self.device)
        n_views = self.rows.features.shape[1]
        if n_views == 1:
            features = self.rows.features[index, 0]
        else:  # each image shows one of its stored views
            drawn = [
                rng.integers(n_views, size=n) for rng, n in zip(rngs, counts, strict=True) if n
            ]
            views = iter(drawn)
            view = [next(views) if n else np.empty(0, np.int64) for n in counts]
            features = self.rows.features[
                index, torch.from_numpy(_padded(view, max(counts))).to(self.device)
            ]
        scores = self.heads(features.to(self.dtype), self._noise, counts)
        rows = torch.tensor(counts, device=self.device)
        losses = torch.zeros(len(counts), dtype=torch.float64, device=self.device)
        for loss, places in _by_loss([runner.loss for runner in self._runners]).items():
            part = index[places]
            within = None if self.rows.within is None else self.rows.within[part]
            labels = self.rows.tiers if loss.label == "tier" else self.rows.tier_scores
            assert labels is not None
            losses[places] = stacked_pair_loss(
                loss, scores[places], labels[part], within, rows[places]
            )
        return losses

    def _judge(self, finite: Sequence[bool]) -> None:
        """Score every head's validation images and let it decide whether it goes on."""
        scores = self._score(
            [r.task.val if not r.finished else r.task.val[:0] for r in self._runners]
        )
        for i, runner in enumerate(self._runners):
            if runner.finished:
                continue
            if runner.update(scores[i], self.epoch, finite[i]):
                runner.arrays = {
                    name: stack.detach()[i].to("cpu", torch.float32, copy=True).numpy()
                    for name, stack in self.heads.weights.items()
                }

    @torch.no_grad()
    def _score(self, wanted: Sequence[Index]) -> list[NDArray[np.float64]]:
        """Each head's scores of its own images: the mean over the views."""
        longest = max(len(index) for index in wanted)
        if not longest:
            return [np.empty(0)] * len(wanted)
        index = torch.from_numpy(_padded(wanted, longest)).to(self.device)
        _, views, width = self.rows.features.shape
        chunk = max(1, _GATHERED // (len(wanted) * views * width))
        parts = [
            self.heads(self.rows.features[part].flatten(1, 2).to(self.dtype))
            .view(len(wanted), part.shape[1], views)
            .mean(2)
            for part in torch.split(index, chunk, dim=1)
        ]
        whole = torch.cat(parts, dim=1).cpu().numpy()
        return [whole[i, : len(index)] for i, index in enumerate(wanted)]

    def _keep(self, places: Sequence[int]) -> None:
        """Go on with some of the heads only."""
        self._runners = [self._runners[i] for i in places]
        self._noise = [self._noise[i] for i in places]
        if places:
            self.heads = self.heads.select(places)
            self.optimizer = self.optimizer.select(self.heads, places)


def train_heads(
    rows: Rows,
    tasks: Sequence[HeadTask],
    device: torch.device,
    on_epoch: Callable[[int, int], None] = lambda *_: None,
) -> list[TrainedHead]:
    """Train heads of equal shape and batch size in stacks of the size that suits the device.

    Args:
        rows: all images that any head learns from.
        tasks: one per head.
        device: where to train.
        on_epoch: as of :meth:`ManyHeads.run`, with the heads of later stacks counted in.

    Returns:
        The heads, in the order of the tasks.
    """
    size = heads_per_stack(rows.input_dim, tasks[0].config.head, device)
    trained: list[TrainedHead] = []
    for start in range(0, len(tasks), size):
        stack = tasks[start : start + size]
        later = len(tasks) - start - len(stack)

        def report(epoch: int, working: int, later: int = later) -> None:
            on_epoch(epoch, working + later)

        trained += ManyHeads(rows, stack, device).run(report)
    return trained


def _recipe(task: HeadTask) -> Recipe:
    return Recipe.of(task.config.train, task.preset, task.steps_per_epoch)


def _padded(parts: Sequence[Index], width: int) -> Index:
    """[H, width]: the parts below each other, filled up with 0."""
    table = np.zeros((len(parts), width), np.int64)
    for i, part in enumerate(parts):
        table[i, : len(part)] = part
    return table


def _by_loss(losses: Sequence[PairLoss]) -> dict[PairLoss, list[int]]:
    places: dict[PairLoss, list[int]] = {}
    for i, loss in enumerate(losses):
        places.setdefault(loss, []).append(i)
    return places
