"""Training and validation images as batches of pixels, decoded and augmented in other processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.image_files import read_image_bytes
from mirip_fast.data.images import decode_squares, to_array
from mirip_fast.errors import DataError, ImageError, TrainingError
from mirip_fast.finetune.augment import decode_size, make_augmentation
from mirip_fast.finetune.plan import Sample


class Pictures(Dataset[Any]):
    """Samples → pixels.

    Args:
        paths: image files.
        size: side in pixels of what the model sees.
        resize: how a picture becomes square.
        draft: whether JPEGs are decoded at reduced scale.
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
        preset: str = "none",
        kept: torch.Tensor | None = None,
    ):
        self.paths = [str(path) for path in paths]
        self.size, self.resize, self.draft, self.kept = size, resize, draft, kept
        self.side = decode_size(preset, size)
        self.augment = make_augmentation(preset, size)

    def __getitem__(self, sample: Sample) -> torch.Tensor | str:
        """[size, size, 3] uint8, or why it can not be read (an exception would lose its wording)."""
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
        data = read_image_bytes(Path(self.paths[index]))
        _, (square,) = decode_squares(data, [self.side], self.resize, draft=self.draft)
        return torch.from_numpy(to_array(square))


def decode_all(pictures: Pictures, workers: int, *, shared: bool = True) -> torch.Tensor:
    """All pictures' squares [n, side, side, 3] uint8.

    Args:
        pictures: what to decode.
        workers: processes that decode.
        shared: in memory that other processes can see.

    Raises:
        DataError: one can not be read; names it.
    """
    n, side = len(pictures.paths), pictures.side
    kept = torch.empty((n, side, side, 3), dtype=torch.uint8)
    if shared:
        kept.share_memory_()  # type: ignore[no-untyped-call]
    jobs = (
        DecodeJob(i, Path(path), (side,), pictures.resize, pictures.draft)
        for i, path in enumerate(pictures.paths)
    )
    with DecodePool(workers) as pool:
        for decoded in pool.decode(jobs):
            if decoded.reason is not None:
                raise DataError(f"{pictures.paths[decoded.index]}: {decoded.reason}")
            kept[decoded.index] = torch.from_numpy(decoded.images[0])
    return kept


class Batches:
    """Hands out batches, prepared ahead by worker processes that stay for the whole run.

    Args:
        pictures: what to load.
        workers: processes; 0 loads in this one.
        prefetch: batches that each prepares ahead.
        pinned: whether batches lie in pinned memory, for quick copies to a GPU.

    Attributes:
        waited: seconds that :meth:`load` has waited for data since it was last set to 0.
    """

    def __init__(self, pictures: Pictures, *, workers: int, prefetch: int, pinned: bool):
        self.waited = 0.0
        self._samples: list[Sequence[Sample]] = []
        closing = multiprocessing.Event()
        atexit.register(closing.set)  # before multiprocessing terminates and awaits its children
        with _no_remark_on_workers():
            self._loader: DataLoader[Any] = DataLoader(
                pictures,
                batch_sampler=_Lists(self._samples),
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                persistent_workers=workers > 0,
                pin_memory=pinned,
                collate_fn=_stack,
                worker_init_fn=_IgnoreSignals(closing),
            )

    def load(self, batches: Sequence[Sequence[Sample]]) -> Iterator[torch.Tensor]:
        """Pixels [b, size, size, 3] uint8 of each batch; an empty one gives an empty tensor.

        Raises:
            DataError: an image can not be read; names it.
            TrainingError: a worker process was killed.
        """
        self._samples[:] = [batch for batch in batches if batch]
        with _no_remark_on_workers():
            loaded = iter(self._loader)
        for batch in batches:
            if not batch:
                yield torch.empty((0, 1, 1, 3), dtype=torch.uint8)
                continue
            started = time.perf_counter()
            try:
                pixels = next(loaded)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise TrainingError(
                    f"A process that decodes training images is gone ({error}). If memory ran out: fewer "
                    "--loader-workers, or a smaller --prefetch. The checkpoints saved before are good."
                ) from error
            self.waited += time.perf_counter() - started
            if isinstance(pixels, str):
                raise DataError(
                    f"{pixels}. It could be read before: bring it back, or take it out of the data."
                )
            yield pixels


@contextmanager
def _no_remark_on_workers() -> Iterator[None]:
    """Keep torch's warning of more processes than cores back: a few that mostly wait do no harm."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


class _IgnoreSignals:
    """Runs in each worker: schedulers signal every process of a job, and the main one decides when to stop.

    Until ``closing`` is set, that is, when the main process ends and terminates what is left of them.
    """

    def __init__(self, closing: Any):
        self.closing = closing

    def __call__(self, worker: int) -> None:
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and self.closing.is_set():
            os._exit(0)


class _Lists:
    """The batch sampler: whatever lists are in ``batches`` when an epoch begins."""

    def __init__(self, batches: list[Sequence[Sample]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter([list(batch) for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def _stack(items: list[torch.Tensor | str]) -> torch.Tensor | str:
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack([item for item in items if isinstance(item, torch.Tensor)])
