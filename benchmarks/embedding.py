"""Running phase one and its rivals on the same files and the same loaded backbone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from mirip_fast.config import EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.features.backbone import Backbone, load_model
from mirip_fast.features.backbone_files import BackboneSpec, find_backbone
from mirip_fast.features.embed import embed
from mirip_fast.features.engine import Speed
from mirip_fast.features.recipe import Recipe, make_recipe, pool_tokens
from mirip_fast.features.store import FeatureStore
from mirip_fast.runtime import usable_cores

CPU = torch.device("cpu")


class PhaseOne:
    """Files on disk → committed rows, with a backbone that is loaded already."""

    def __init__(
        self,
        spec: BackboneSpec,
        backbone: Backbone,
        size: int,
        folder: Path,
        precision: str = "fp32",
    ):
        self.backbone, self.folder = backbone, folder
        self.recipe: Recipe = make_recipe(
            EmbedConfig(image_size=size, patches="mean"), spec, precision
        )
        self.speed: Speed | None = None

    def run(self, paths: Sequence[Path], *, batch_size: int | None = None) -> pd.DataFrame:
        """Embed into a new store; what became of each picture."""
        shutil.rmtree(self.folder, ignore_errors=True)
        store = FeatureStore.create(self.folder / "store", self.recipe.fingerprint)

        def keep(speed: Speed) -> None:
            self.speed = speed

        with HashMemory(self.folder / "hashes.sqlite") as hashes:
            outcomes = embed(
                paths, self.recipe, store, lambda: self.backbone, hashes,
                workers=min(16, usable_cores()), batch_size=batch_size, on_speed=keep,
            )  # fmt: skip
        bad = outcomes["reason"].dropna().tolist()
        if bad:
            raise SystemExit(
                f"{len(bad)} pictures failed ({bad[0]}): give --data a folder without faults"
            )
        return outcomes


def load(name: str) -> tuple[BackboneSpec, Backbone]:
    """A backbone on the CPU in float32."""
    with HashMemory(None) as hashes:
        spec = find_backbone(name, hashes.sha256)
    return spec, Backbone(spec, load_model(spec), CPU, "fp32")


def large() -> tuple[BackboneSpec, nn.Module]:
    """The architecture of DINOv2-Large with random weights: as fast as the trained one."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=518,
    )
    spec = BackboneSpec(
        name="DINOv2-Large architecture, random weights", folder=None, weights_id="random",
        model_type="dinov2", hidden_size=1024, patch_size=14, num_layers=24, num_register_tokens=0,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    torch.manual_seed(0)
    return spec, Dinov2Model(config)


class Stub(Backbone):
    """A backbone that takes no time; its features are numbers without meaning."""

    def __init__(self, spec: BackboneSpec):
        super().__init__(spec, nn.Identity(), CPU, "fp32")
        self._token = torch.linspace(-1, 1, spec.hidden_size)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Nothing but the first pixel is looked at."""
        return images.permute(0, 3, 1, 2)

    def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """The same token everywhere, but for the first pixel."""
        n, side = len(pixels), pixels.shape[-1] // self.spec.patch_size
        cls = self._token + pixels[:, 0, 0, :1].float()
        patches = cls.view(n, 1, 1, -1).expand(n, side, side, -1)
        return {kind: pool_tokens(kind, cls, patches) for kind in kinds}


def bare_decode(paths: Sequence[Path], size: int) -> list[np.ndarray]:
    """Decode and resize on this thread, with nothing around it; JPEGs at reduced scale as phase one does."""
    squares = []
    for path in paths:
        image = Image.open(path)
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))
        squares.append(
            np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        )
    return squares


@torch.inference_mode()
def bare_forward(backbone: Backbone, batches: Sequence[torch.Tensor], threads: int) -> None:
    """Pass ready tensors through the backbone, with nothing around it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for batch in batches:
        backbone.model(batch)
    torch.set_num_threads(before)


def batches(backbone: Backbone, squares: Sequence[np.ndarray], size: int) -> list[torch.Tensor]:
    """Normalised tensors, ``size`` pictures each."""
    return [
        backbone.normalise(torch.from_numpy(np.stack(squares[i : i + size])))
        for i in range(0, len(squares), size)
    ]


class _Files(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, paths: Sequence[Path], size: int, spec: BackboneSpec):
        self._paths, self._size = list(paths), size
        self._mean = np.array(spec.mean, np.float32)
        self._std = np.array(spec.std, np.float32)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self._paths[index]).convert("RGB")
        image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - self._mean) / self._std
        return torch.from_numpy(pixels).permute(2, 0, 1)


@torch.inference_mode()
def plain_loop(
    backbone: Backbone, paths: Sequence[Path], size: int, file: Path, batch_size: int
) -> None:
    """What one would write: a DataLoader with a worker per core, a loop, an HDF5 file that grows."""
    import h5py

    cores = usable_cores()
    torch.set_num_threads(cores)
    loader = torch.utils.data.DataLoader(
        _Files(paths, size, backbone.spec), batch_size=batch_size, num_workers=cores
    )
    with h5py.File(file, "w") as out:
        width = backbone.spec.hidden_size
        rows = out.create_dataset(
            "cls", (0, width), "f2", maxshape=(None, width), chunks=(64, width)
        )
        for pixels in loader:
            cls = backbone.model(pixels).last_hidden_state[:, 0]
            rows.resize(len(rows) + len(cls), 0)
            rows[-len(cls) :] = cls.numpy()
            out.flush()


class Pipeline:
    """``transformers.pipeline("image-feature-extraction")`` on the same files."""

    def __init__(self, folder: Path, model: nn.Module):
        from transformers import AutoImageProcessor, pipeline

        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        self._pipe = pipeline(
            "image-feature-extraction", model=model, image_processor=processor, device=CPU
        )

    def run(self, paths: Sequence[Path], batch_size: int) -> None:
        """Features of all files, in memory."""
        torch.set_num_threads(usable_cores())
        for _ in self._pipe((str(path) for path in paths), batch_size=batch_size):
            pass
