"""Training and validation images: which ones a step sees, what is done to them, and loading their pixels.

A step's images, augmentation and mixtures are a function of seed and epoch alone. Pixels are decoded and
augmented by worker processes.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.images import UTMOST_PIXELS, decode_squares, to_array
from mirip_fast.data.sources import read_image
from mirip_fast.errors import DataError, ImageError, TrainingError
from mirip_fast.runtime import Closing, end_with_parent

Ints = NDArray[np.int64]

PRESETS = ("none", "light", "strong")

#: Smallest share of an image's area that a crop shows.
_SMALLEST_CROP = 0.8

# A forked process has the decoded pictures and the imported packages of this one at once, and for nothing.
_PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_SPARE = 1 << 30  # bytes of memory that other things need besides kept pictures


class Sample(NamedTuple):
    """One image of a step.

    Attributes:
        image: its index.
        seed: of its augmentation.
        partner: index of the image that is mixed in, −1 for none.
        share: how much of the mixture is ``image``, 0 … 1.
        box: (left, top, right, bottom) in pixels, what CutMix takes from the partner; None with Mixup.
    """

    image: int
    seed: int
    partner: int = -1
    share: float = 1.0
    box: tuple[int, int, int, int] | None = None


def balanced_batches(
    tiers: Ints, groups: Sequence[str | None], batch_size: int, rng: np.random.Generator
) -> list[Ints]:
    """One epoch in batches: every image once, every tier in every batch, groups spread over the batches.

    Tier by tier, and inside a tier group by group, images are dealt out like cards. So the counts of a
    tier in two batches differ by at most one, and so do those of a group inside a tier. A tier with fewer
    images than there are batches is dealt again until every batch has one: only its images come more
    than once.

    Args:
        tiers: [n] tier of each image.
        groups: [n] group of each, or None.
        batch_size: images per batch, at most; above the number of tiers.
        rng: source of the draw.

    Returns:
        Index arrays of sizes that differ by at most one, each in random order.
    """
    hands = [_dealt(np.flatnonzero(tiers == tier), groups, rng) for tier in np.unique(tiers)]
    batches = max(1, -(-len(tiers) // batch_size))
    # Repeated images take room, which may take another batch, which may take more of them.
    while sum(max(len(hand), batches) for hand in hands) > batches * batch_size:
        batches += 1
    cards = []
    for hand in hands:
        again = [rng.permutation(hand) for _ in range(-(-batches // len(hand)) - 1)]
        cards.append(np.concatenate([hand, *again])[: max(len(hand), batches)])
    deck = np.concatenate(cards)
    dealt = [rng.permutation(deck[i::batches]) for i in range(batches)]
    return [dealt[int(i)] for i in rng.permutation(batches)]


def _dealt(images: Ints, groups: Sequence[str | None], rng: np.random.Generator) -> Ints:
    """Images in random order, those of one group one after the other, groups in random order."""
    order = rng.permutation(images)
    place: dict[str | int, int] = {}
    keys = []
    for i in order.tolist():
        group = groups[i]
        keys.append(place.setdefault(i if group is None else group, len(place)))
    return order[np.argsort(keys, kind="stable")].astype(np.int64)


def plan_epoch(
    tiers: Ints,
    groups: Sequence[str | None],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    mixing: dict[str, float] | None = None,
    size: int = 1,
    within: Ints | None = None,
) -> list[list[Sample]]:
    """The images of all steps of an epoch.

    Args:
        tiers: [n] tier of each training image.
        groups: [n] group of each, or None.
        batch_size: images per step.
        seed: of the run.
        epoch: counted from 1.
        mixing: ``mixup`` or ``cutmix`` or both → alpha of its Beta distribution; of both a coin chooses one
            for each batch.
        size: side of the images in pixels, which CutMix cuts from.
        within: [n] codes; images are mixed with those of the same code only.
    """
    rng = np.random.default_rng([seed, epoch])
    steps = []
    for batch in balanced_batches(tiers, groups, batch_size, rng):
        seeds = rng.integers(2**62, size=len(batch))
        samples = [Sample(int(i), int(s)) for i, s in zip(batch, seeds, strict=True)]
        kind = str(rng.choice(list(mixing))) if mixing else ""
        if mixing and kind:
            samples = _mix(samples, kind, mixing[kind], size, within, rng)
        steps.append(samples)
    return steps


def mixed_grades(samples: Sequence[Sample], grades: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B] grade of each sample: of a mixture the mixture of the two grades, by the shares of the pixels."""
    partner = [s.image if s.partner < 0 else s.partner for s in samples]
    share = np.array([s.share for s in samples])
    return share * grades[[s.image for s in samples]] + (1 - share) * grades[partner]


def _mix(
    samples: list[Sample],
    kind: str,
    alpha: float,
    size: int,
    within: Ints | None,
    rng: np.random.Generator,
) -> list[Sample]:
    index = np.array([sample.image for sample in samples])
    codes = np.zeros(len(index)) if within is None else within[index]
    partners = np.empty_like(index)
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        partners[members] = index[rng.permutation(members)]
    mixed = []
    for sample, partner in zip(samples, partners.tolist(), strict=True):
        share = float(rng.beta(alpha, alpha))
        box = None
        if kind == "cutmix":
            box = _box(share, size, rng)
            area = (box[2] - box[0]) * (box[3] - box[1])
            share = 1 - area / size**2
        mixed.append(sample._replace(partner=partner, share=share, box=box))
    return mixed


def _box(share: float, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of about 1 − share of the image, cut at its edges (Yun et al. 2019, arXiv 1905.04899)."""
    half = size * (1 - share) ** 0.5 / 2
    x, y = rng.uniform(0, size, 2)
    ends = np.clip(np.round([x - half, y - half, x + half, y + half]), 0, size).astype(int)
    left, top, right, bottom = ends.tolist()
    return left, top, right, bottom


def decode_size(preset: str, size: int) -> int:
    """Side in pixels at which images are decoded, so that the smallest crop is not blown up."""
    return size if preset == "none" else round(size / _SMALLEST_CROP**0.5)


def make_augmentation(preset: str, size: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The transforms of a preset: [3, H, W] uint8 → [3, size, size] uint8; None for ``none``.

    ``light``: a crop of 80–100 % of the area, mirrored or not. ``strong``: besides, turned by up to 10°,
    brightness, contrast, saturation and hue changed by up to 0.1, and two operations of RandAugment at
    magnitude 9 (Cubuk et al. 2020, arXiv 1909.13719).
    """
    if preset == "none":
        return None
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    light = [
        v2.RandomResizedCrop(
            size, scale=(_SMALLEST_CROP, 1.0), interpolation=bicubic, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ]
    if preset == "light":
        return v2.Compose(light)  # type: ignore[no-any-return]
    white = 255  # as transparency and padding are
    strong = [
        v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR, fill=white),
        v2.ColorJitter(0.1, 0.1, 0.1, 0.1),
        v2.RandAugment(num_ops=2, magnitude=9, fill=white),
    ]
    return v2.Compose([*light, *strong])  # type: ignore[no-any-return]


class Pictures:
    """Samples → pixels.

    Args:
        paths: image files.
        size: side in pixels of what the model sees.
        resize: how a picture becomes square.
        draft: whether JPEGs are decoded at reduced scale.
        srgb: whether colour profiles are applied.
        preset: of the augmentation.
        kept: decoded squares [n, side, side, 3] uint8, see :func:`decode_all`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        *,
        resize: str = "squash",
        draft: bool = True,
        srgb: bool = True,
        preset: str = "none",
        kept: torch.Tensor | None = None,
    ):
        self.paths = [str(path) for path in paths]
        self.size, self.resize, self.draft, self.srgb, self.kept = size, resize, draft, srgb, kept
        self.side = decode_size(preset, size)
        self.augment = make_augmentation(preset, size)

    def __getitem__(self, sample: Sample) -> torch.Tensor | str:
        """[size, size, 3] uint8, or why it cannot be read (an exception would lose its wording)."""
        try:
            picture = self._augmented(sample.image, sample.seed)
            if sample.partner < 0:
                return picture
            other = self._augmented(sample.partner, sample.seed + 1)
        except ImageError as error:
            return f"{self.paths[sample.image]}: {error}"
        if sample.box is None:
            mixture = sample.share * picture.float() + (1 - sample.share) * other.float()
            return mixture.round().to(torch.uint8)
        left, top, right, bottom = sample.box
        picture[top:bottom, left:right] = other[top:bottom, left:right]
        return picture

    def _augmented(self, index: int, seed: int) -> torch.Tensor:
        square = self.kept[index] if self.kept is not None else self._decode(index)
        if self.augment is None:
            return square.clone()
        with torch.random.fork_rng(devices=[]):  # in the main process others draw from it too
            torch.manual_seed(seed)
            augmented: torch.Tensor = self.augment(square.permute(2, 0, 1))
        return augmented.permute(1, 2, 0).contiguous()

    def _decode(self, index: int) -> torch.Tensor:
        data = read_image(Path(self.paths[index]))[0]
        squares = decode_squares(
            data, [self.side], self.resize,
            draft=self.draft, max_pixels=UTMOST_PIXELS, srgb=self.srgb,
        )  # fmt: skip
        return torch.from_numpy(to_array(squares.images[0]))


def decode_all(pictures: Pictures, workers: int) -> torch.Tensor:
    """All pictures' squares [n, side, side, 3] uint8, in memory that the workers of :class:`Batches` see.

    Args:
        pictures: what to decode.
        workers: processes that decode.

    Raises:
        DataError: one cannot be read; names it.
    """
    n, side = len(pictures.paths), pictures.side
    kept = torch.empty((n, side, side, 3), dtype=torch.uint8)
    if _PROCESSES.get_start_method() != "fork":
        kept.share_memory_()  # type: ignore[no-untyped-call]
    jobs = (
        DecodeJob(
            i,
            Path(path),
            (side,),
            pictures.resize,
            pictures.draft,
            max_pixels=UTMOST_PIXELS,
            srgb=pictures.srgb,
        )
        for i, path in enumerate(pictures.paths)
    )
    with DecodePool(workers) as pool:
        for decoded in pool.decode(jobs):
            if decoded.reason is not None:
                raise DataError(f"{pictures.paths[decoded.index]}: {decoded.reason}")
            kept[decoded.index] = torch.from_numpy(decoded.images[0])
    return kept


def room_in_memory() -> int | None:
    """Bytes that pictures may be kept in, the limit of a container counted in (Linux); None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        if limit.strip() != "max":
            found.append(int(limit) - int(used))
    return max(0, min(found) - _SPARE) if found else None


class Batches(Closing):
    """Hands out batches, prepared ahead by worker processes that stay until it is closed.

    Pixels come over a pipe of each worker's own. So nothing lies in /dev/shm, which is small in containers,
    and no lock or pipe is shared that a killed worker could hold or fill by half for ever, as with torch's
    ``DataLoader`` and with ``ProcessPoolExecutor``.

    Args:
        pictures: what to load.
        workers: processes; 0 loads in this one.
        prefetch: batches that each prepares ahead.
        pinned: whether batches lie in pinned memory, for quick copies to a GPU.

    Attributes:
        waited: seconds that :meth:`load` has waited for data since it was last set to 0.
    """

    def __init__(self, pictures: Pictures, workers: int, prefetch: int, *, pinned: bool):
        self.waited = 0.0
        self._pictures, self._pinned = pictures, pinned
        self._count, self._ahead = workers, workers * prefetch
        self._workers: list[_LoaderProcess] = []

    def load(self, batches: Sequence[Sequence[Sample]]) -> Iterator[torch.Tensor]:
        """Pixels [b, size, size, 3] uint8 of each batch; an empty one gives an empty tensor.

        Raises:
            DataError: an image cannot be read; names it.
            TrainingError: a worker process cannot be started, or was killed.
        """
        self._start()
        filled = [batch for batch in batches if batch]
        asked: deque[Future[torch.Tensor | str]] = deque()
        sent = 0
        try:
            for batch in batches:
                if not batch:
                    yield torch.empty((0, 1, 1, 3), dtype=torch.uint8)
                    continue
                started = time.perf_counter()
                while self._workers and sent < len(filled) and len(asked) <= self._ahead:
                    asked.append(self._workers[sent % self._count].ask(filled[sent]))
                    sent += 1
                pixels = asked.popleft().result() if asked else _stacked(self._pictures, batch)
                self.waited += time.perf_counter() - started
                if isinstance(pixels, str):
                    raise DataError(
                        f"{pixels}. It could be read before: bring it back, or take it out of the data."
                    )
                yield pixels
        finally:
            for future in asked:
                future.cancel()

    def close(self) -> None:
        """End the workers."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _start(self) -> None:
        if self._workers:
            return
        atexit.register(self.close)  # before multiprocessing, which would wait for its children
        try:
            while len(self._workers) < self._count:
                self._workers.append(_LoaderProcess(self._pictures, self._pinned))
        except (OSError, RuntimeError) as error:  # no more processes or threads, no memory
            begun = len(self._workers)
            self.close()
            raise TrainingError(
                f"Of {self._count} processes that decode training images only {begun} could be started "
                f"({error}). Fewer --loader-workers do too; 0 decodes in the main process."
            ) from error


class _LoaderProcess:
    """A process that makes batches, and the thread of this one that talks to it."""

    def __init__(self, pictures: Pictures, pinned: bool):
        self._pinned = pinned
        # The process is started in this thread, as Linux ends it when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "mirip-load")
        self._channel, theirs = _PROCESSES.Pipe()
        with theirs:
            self._process = _PROCESSES.Process(
                target=_serve, args=(pictures, theirs, os.getpid()), daemon=True
            )
            try:
                self._thread.submit(self._process.start).result()
            except BaseException:
                self._channel.close()
                self._thread.shutdown(wait=False)
                raise
        self.pid = int(self._process.pid)

    def ask(self, samples: Sequence[Sample]) -> Future[torch.Tensor | str]:
        """Have a batch made, after those that were asked for before."""
        return self._thread.submit(self._fetch, list(samples))

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Let go of a killed process."""
        self._thread.shutdown(cancel_futures=True)
        # One that is stuck in a dead network drive outlives even that signal for a while: leave it.
        self._process.join(1.0)
        self._channel.close()

    def _fetch(self, samples: list[Sample]) -> torch.Tensor | str:
        try:
            self._channel.send(samples)
            answer = self._channel.recv()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, str):
                return answer
            pixels = torch.empty(answer, dtype=torch.uint8, pin_memory=self._pinned)
            self._channel.recv_bytes_into(pixels.numpy().data.cast("B"))
            return pixels
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            raise TrainingError(
                f"A process that decodes training images is gone ({_how_ended(self._process.exitcode)}). "
                "If memory ran out: fewer --loader-workers, or a smaller --prefetch. The checkpoints saved "
                "before are good."
            ) from error


def _serve(pictures: Pictures, channel: Any, parent: int) -> None:
    """Answer with batches until the parent ends: the main function of a worker process."""
    end_with_parent(parent)
    # Schedulers signal every process of a job, and the parent decides when to stop.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the parent's
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            samples = channel.recv()
            try:
                batch: torch.Tensor | str | Exception = _stacked(pictures, samples)
            except Exception as error:
                batch = RuntimeError(f"{type(error).__name__}: {error}")
            if isinstance(batch, torch.Tensor):
                channel.send(tuple(batch.shape))
                channel.send_bytes(batch.numpy().data.cast("B"))
            else:
                channel.send(batch)


def _stacked(pictures: Pictures, samples: Sequence[Sample]) -> torch.Tensor | str:
    """[b, size, size, 3] uint8, or why an image cannot be read."""
    items = []
    for sample in samples:
        item = pictures[sample]
        if isinstance(item, str):
            return item
        items.append(item)
    return torch.stack(items)


def _how_ended(status: int | None) -> str:
    if status is None or status >= 0:
        return "it does not answer" if status is None else f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"
