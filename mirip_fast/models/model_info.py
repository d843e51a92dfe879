"""What a trained head expects of its input: kept inside every checkpoint and beside the NumPy head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.errors import CheckpointError
from mirip_fast.features.recipe import View, head_kinds
from mirip_fast.features.store import fingerprint_id
from mirip_fast.settings import config_from_dict


@dataclass(frozen=True)
class ModelInfo:
    """The features a head was trained on, and what its scores are about.

    Attributes:
        fingerprint: of the store that the features came from.
        embed: phase one's options that lead to it again on another folder.
        views: the views whose scores are averaged, the base view first.
        features: kinds joined by +, such as ``cls+mean``; ``mean@2`` is that of the second backbone.
        tiers: names of the tiers, best first.
        input_dim: numbers per feature row.
        more: what is looked at through each further backbone, with as many views.
    """

    fingerprint: dict[str, Any]
    embed: EmbedConfig
    views: tuple[View, ...]
    features: str
    tiers: tuple[str, ...]
    input_dim: int
    more: tuple[ModelInfo, ...] = ()

    @property
    def backbones(self) -> tuple[ModelInfo, ...]:
        """What is looked at through each backbone alone; the inverse of :meth:`joined`."""
        own = "+".join(kind for kind in self.kinds if "@" not in kind)
        width = self.input_dim - sum(info.input_dim for info in self.more)
        return (replace(self, features=own, input_dim=width, more=()), *self.more)

    @classmethod
    def joined(cls, infos: Sequence[ModelInfo]) -> ModelInfo:
        """What looks through several backbones: the kinds of the second one get the ending ``@2``."""
        kinds = [
            kind if i == 1 else f"{kind}@{i}"
            for i, each in enumerate(infos, 1)
            for kind in each.kinds
        ]
        width = sum(each.input_dim for each in infos)
        return replace(infos[0], features="+".join(kinds), input_dim=width, more=tuple(infos[1:]))

    @property
    def blocks(self) -> list[int]:
        """Numbers per kind, in the order of :attr:`kinds`."""
        return [each.input_dim // len(each.kinds) for each in self.backbones for _ in each.kinds]

    def looking_at(self, kinds: Collection[str]) -> ModelInfo:
        """The same with some of its kinds only; a backbone that has none of them is left out."""
        parts = []
        for i, each in enumerate(self.backbones, 1):
            own = [kind for kind in each.kinds if (kind if i == 1 else f"{kind}@{i}") in kinds]
            width = each.input_dim // len(each.kinds) * len(own)
            parts += [replace(each, features="+".join(own), input_dim=width)] * bool(own)
        return self.joined(parts)

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
            **({"more": [info.to_dict() for info in self.more]} if self.more else {}),
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
                more=tuple(map(cls.from_dict, values.get("more", ()))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint does not say what its head expects ({error!r})"
            ) from error


def looked_at(info: ModelInfo) -> str:
    """``cls+mean``, and where there are several backbones those of each: ``cls of A, cls+mean of B``."""
    if not info.more:
        return info.features
    return ", ".join(f"{each.features} of {each.embed.backbone}" for each in info.backbones)


def beside(checkpoint: Path, info: ModelInfo) -> ModelInfo:
    """The same, with a backbone that lies in the checkpoint's folder found again after a move."""
    info = replace(info, more=tuple(beside(checkpoint, each) for each in info.more))
    folder = checkpoint.resolve().parent / Path(info.embed.backbone).name
    if Path(info.embed.backbone).is_dir() or not (folder / "config.json").is_file():
        return info
    return replace(info, embed=replace(info.embed, backbone=str(folder)))
