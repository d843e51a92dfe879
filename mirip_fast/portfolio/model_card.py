"""The model card of a shared model: what it is, how good it is and how sure that is, and what it is not for.

The headings follow Mitchell et al. 2019, «Model Cards for Model Reporting». Every figure is read from the
run's own files; where there is none, the card says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirip_fast.errors import DataError
from mirip_fast.features.pooling import layer_of
from mirip_fast.files import read_json
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import ENSEMBLE, SPLIT_FILE, Run

_OUT_OF_FOLD = "evaluation_out_of_fold.json"
_TEST = "evaluation_test.json"


def model_card(model: ScoreModel, backbone: str, known: Sequence[str] = ()) -> str:
    """The card as Markdown with the hub's metadata block.

    Args:
        model: a model in its run's folder.
        backbone: name of the backbone, as it may be told.
        known: what else is in the folder for `rank` to tell, in words.

    Raises:
        DataError: the run's files are damaged.
    """
    info = model.info
    views = ", ".join(
        f"{view.size} pixels{', mirrored' if view.flip else ''}" for view in info.views
    )
    parts = [
        _metadata(backbone),
        "# A grader's taste, as a ranking head",
        "Scores pictures so that those a particular grader would put higher score higher. It was trained "
        f"with mirip-fast on the pictures described below; it is {_kind(model)}.",
        f"- backbone: `{backbone}` (a score is refused if its weights are others)\n"
        f"- it looks at: {' and '.join(_tokens_text(kind) for kind in info.kinds)}\n"
        f"- views of each picture: {views}; made square by `{info.embed.resize}`\n"
        f"- {_readout(model)}\n"
        f"- tiers, best first: {', '.join(info.tiers) or 'none'}\n"
        f"- what it tells besides scores: {'; '.join(known) or 'nothing'}",
        "## Use",
        "```bash\npip install mirip-fast\n"
        "mirip-fast rank pictures/ --checkpoint THIS_FOLDER\n```\n\n"
        "If the backbone lies in a folder of your own, add `--backbone FOLDER`.",
        "## Data",
        _data(model),
        _kept_of_works(model),
        "## How good it is",
        _accuracy(model),
        "## Intended use",
        "Sorting a portfolio as a first reading, finding works that deserve a second look, and checking a "
        "grader's consistency: by people who know the grades it was trained on, with a person deciding.",
        "## Limits",
        "- It repeats the taste, and the biases, of the grades it has seen. It does not measure quality.\n"
        "- Scores of other kinds of pictures than those it was trained on (another medium, another subject, "
        "photographs instead of scans) mean little.\n"
        "- It must not decide alone about a person: no admission, rejection or grade without a person "
        "who looks at the works.\n"
        "- A score has no unit and small differences mean little: the table above tells how often the "
        "higher of two scores is right.\n"
        "- Lighting, framing and the camera change a score; photograph works alike before comparing them.",
    ]
    return "\n\n".join(parts) + "\n"


def _readout(model: ScoreModel) -> str:
    if model.process is not None:
        return "a Gaussian process"
    members = len(model.members)
    heads = [member.head for member in model.members if isinstance(member.head, NumpyHead)]
    what = "head" if heads[0].attention is None else "head that attends to patch tokens"
    if members == 1:
        return f"one {what}"
    if len(heads) < members:
        return (
            f"an ensemble of a Gaussian process and {len(heads)} heads, whose scores are averaged"
        )
    return f"an ensemble of {members} {what.replace('head', 'heads', 1)}, whose scores are averaged"


def _kind(model: ScoreModel) -> str:
    folder = model.checkpoint.resolve().parent
    if folder in Path(model.info.embed.backbone).resolve().parents:
        return "a head and the backbone that was fine-tuned with it, both in this folder"
    small = "a Gaussian process" if _has_process(model) else "a small head"
    return f"{small} on the features of a frozen backbone, which is not part of this folder"


def _has_process(model: ScoreModel) -> bool:
    return any(isinstance(member.head, GaussianProcess) for member in model.members)


def _kept_of_works(model: ScoreModel) -> str:
    """What the folder holds of the works that the model was trained on."""
    checksums = (
        "the SHA-256 checksums of their files (who has such a file can tell that it was among them)"
    )
    if model.process is None:
        return f"Of these pictures the folder holds {checksums}; no pictures and no names."
    return (
        "A Gaussian process scores by comparing with the works it learned from: the folder holds the "
        f"backbone's features of each of them, and {checksums}; no pictures and no names."
    )


_TOKENS = {"cls": "the CLS token", "mean": "the mean of the patch tokens"}


def _tokens_text(kind: str) -> str:
    kind, _, number = kind.partition("@")
    token, layer = kind.partition("_")[0], layer_of(kind)
    text = _TOKENS.get(token, "patch tokens") + (f" after block {layer}" if layer else "")
    return text + (f" of backbone {number}" if number else "")


def _metadata(backbone: str) -> str:
    lines = ["---", "library_name: mirip-fast", "tags:", "- ranking", "- learning-to-rank", "- art"]
    if backbone.count("/") == 1:  # a name on the hub
        lines += [f"base_model: {backbone}"]
    return "\n".join([*lines, "---"])


def _data(model: ScoreModel) -> str:
    folder = model.checkpoint.parent
    path = folder / SPLIT_FILE
    if not Run(folder).has(SPLIT_FILE):
        return "Not known: the run's list of images was not at hand when this card was written."
    data = config_from_dict({"data": Run(folder).info.get("data", {})}).data
    images = load_split(path, model.info.tiers, data)
    splits = sorted(set(images.splits), key=lambda name: (name != "train", name != "val", name))
    about = f"{len(images)} graded pictures" + _groups(images)
    if not images.has_tiers:
        return about + "; they have no tiers."
    lines = [
        about + ".",
        "",
        "| tier | " + " | ".join(splits) + " | all |",
        "|---|" + "---|" * (len(splits) + 1),
    ]
    for number, tier in enumerate(model.info.tiers):
        here = [s for s, t in zip(images.splits, images.tiers, strict=True) if t == number]
        counts = Counter(here)
        cells = " | ".join(str(counts[split]) for split in splits)
        lines.append(f"| {_cell(tier)} | {cells} | {len(here)} |")
    return "\n".join(lines)


def _groups(images: GradedImages) -> str:
    splits_of: dict[str, set[str]] = {}
    for record, split in zip(images.manifest.records, images.splits, strict=True):
        if record.group is not None:
            splits_of.setdefault(record.group, set()).add(split)
    if not splits_of:
        return ""
    whole = all(len(splits) == 1 for splits in splits_of.values())
    return f" in {len(splits_of)} groups" + (", each of them in one split" if whole else "")


def _accuracy(model: ScoreModel) -> str:
    found = _evaluation(model)
    if found is None:
        return (
            "**Not evaluated.** Nobody has judged this model on pictures that it had not seen; run "
            "`mirip-fast evaluate` and export it again."
        )
    values, where = found
    try:
        if "pairwise_accuracy" not in values:
            judged = values["judged_pairs"]
            told = judged["accuracy"] and f"{judged['accuracy']:.3f}"
            return (
                f"It puts {told or 'none'} of {judged['pairs']:,} pairs {where} that people had judged "
                "in the right order. Chance is 0.5."
            )
        interval = values["pairwise_accuracy_interval"]
        accuracy, images, pairs = (
            float(values["pairwise_accuracy"]), int(values["n_images"]), int(values["n_pairs"]),
        )  # fmt: skip
        span = (
            "; its interval is unknown, for the groups are too few"
            if interval is None
            else f" ({interval['confidence']:.0%} interval {interval['low']:.3f} – {interval['high']:.3f}, "
            "by resampling whole groups)"
        )
        lines = [
            f"Pairwise accuracy **{accuracy:.3f}**{span}: the share of {pairs:,} pairs of different grades "
            f"that it puts in the right order, on {images:,} pictures {where}. Chance is 0.5.",
        ]
        lines += values["tier_pairs"] and [
            "",
            "| better | worse | pairs | accuracy |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {_cell(row['better'])} | {_cell(row['worse'])} | {row['pairs']} | {row['accuracy']:.3f} |"
            for row in values["tier_pairs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the evaluation in {model.checkpoint.parent} can not be read ({error!r}); run "
            "`mirip-fast evaluate` again"
        ) from error
    return "\n".join(lines)


def _evaluation(model: ScoreModel) -> tuple[dict[str, Any], str] | None:
    """The run's evaluation of this very model, and on what; None where there is none."""
    folder, name = model.checkpoint.parent, model.checkpoint.name
    if name == ENSEMBLE and (folder / _OUT_OF_FOLD).is_file():
        return _read(folder / _OUT_OF_FOLD), "by the members that had not trained on them"
    path = folder / _TEST
    if not path.is_file() or path.stat().st_mtime < model.checkpoint.stat().st_mtime:
        return None
    values = _read(path)
    if Path(str(values.get("checkpoint", ""))).name != name:
        return None
    return values, "of the test split"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can not be read ({error}); run `mirip-fast evaluate` again"
        ) from error


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
