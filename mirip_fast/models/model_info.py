"""What a trained head expects of its input: kept inside every checkpoint and beside the NumPy head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.errors import CheckpointError
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.recipe import View
from mirip_fast.features.store import fingerprint_id
from mirip_fast.settings import config_from_dict


@dataclass(frozen=True)
class ModelInfo:
    """The features a head was trained on, and what its scores are about.

    Attributes:
        fingerprint: of the store that the features came from.
        embed: phase one's options that lead to it again on another folder.
        views: the views whose scores are averaged, the base view first.
        features: ``cls``, ``mean`` or ``cls+mean``.
        tiers: names of the tiers, best first.
        input_dim: numbers per feature row.
    """

    fingerprint: dict[str, Any]
    embed: EmbedConfig
    views: tuple[View, ...]
    features: str
    tiers: tuple[str, ...]
    input_dim: int

    @property
    def fingerprint_id(self) -> str:
        """Name of the store's folder."""
        return fingerprint_id(self.fingerprint)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The token kinds that the head looks at."""
        return head_kinds(self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint or JSON."""
        return {
            "fingerprint": self.fingerprint,
            "embed": vars(self.embed).copy(),
            "views": [[view.size, view.flip] for view in self.views],
            "features": self.features,
            "tiers": list(self.tiers),
            "input_dim": self.input_dim,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelInfo:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: an entry is missing or wrong.
        """
        try:
            config: Config = config_from_dict({"embed": values["embed"]})
            return cls(
                fingerprint=dict(values["fingerprint"]),
                embed=config.embed,
                views=tuple(View(int(size), bool(flip)) for size, flip in values["views"]),
                features=str(values["features"]),
                tiers=tuple(str(tier) for tier in values["tiers"]),
                input_dim=int(values["input_dim"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not say what its head expects ({error!r})"
            ) from error


def beside(checkpoint: Path, info: ModelInfo) -> ModelInfo:
    """The same, with a backbone that lies in the checkpoint's folder found again after a move."""
    folder = checkpoint.resolve().parent / Path(info.embed.backbone).name
    if Path(info.embed.backbone).is_dir() or not (folder / "config.json").is_file():
        return info
    return replace(info, embed=replace(info.embed, backbone=str(folder)))
