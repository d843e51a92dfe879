"""A trained model in a folder to share: `export --hf` adds settings and a model card, `export` ONNX graphs.

The folder is a model of its own: ``mirip-fast rank --checkpoint FOLDER`` gives the table that the run gives,
with percentiles, tiers, intervals and win rates. Nothing in it names a path, a file or a work of the data
that it was trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirip_fast import __version__
from mirip_fast.config import EmbedConfig
from mirip_fast.errors import ConfigError, DataError, StoreError
from mirip_fast.features.recipe import layer_of
from mirip_fast.files import (
    LIST_FILE,
    list_files,
    move_files,
    read_json,
    scratch_folder,
    write_csv,
    write_json,
    write_text,
)
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.anchors import ANCHORS_FILE, find_anchors, save_anchors
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import (
    CALIBRATION_FILE,
    MADE_WITH_FILE,
    learned_from,
    load_calibration,
    save_calibration,
)
from mirip_fast.ranking.score_model import ScoreModel, save_members
from mirip_fast.training.run_folder import ENSEMBLE, PROCESS, RUN_FILE, SPLIT_FILE, Run

log = logging.getLogger(__name__)

_OUT_OF_FOLD = "evaluation_out_of_fold.json"
_TEST = "evaluation_test.json"
_CARD = "README.md"
_SETTINGS = "config.json"
_PLOT = "calibration.png"
#: What a shared model may have: of an earlier export, none of it may stay beside another model.
_MODEL_FILES = (
    ENSEMBLE, PROCESS, CALIBRATION_FILE, ANCHORS_FILE, MADE_WITH_FILE, LIST_FILE,
)  # fmt: skip
#: What a backbone of a run consists of; its weights are found by their ending.
_BACKBONE_FILES = ("config.json", "preprocessor_config.json")


def write_hub_folder(
    model: ScoreModel, out: Path, cache_dir: Path, *, overwrite: bool = False
) -> list[Path]:
    """Write a model as safetensors, with what gives its scores a meaning, its settings and a model card.

    Args:
        model: heads or a Gaussian process, in its run's folder.
        out: the folder; made if missing.
        cache_dir: folder of the stores, for anchors that are still to be chosen.
        overwrite: replace files of an earlier export.

    Returns:
        The files written.

    Raises:
        ConfigError: ``out`` is a file or a run, or has the files already.
        DataError: the run's files are damaged.
    """
    own = model_files(model)
    refuse_existing(out, (*own, _SETTINGS, _CARD, _PLOT), overwrite=overwrite)
    info = shareable(model.info)
    with scratch_folder(out, "export") as folder:
        known = write_model(model, folder, cache_dir)
        backbones = ", ".join(each.embed.backbone for each in info.backbones)
        write_json(folder / _SETTINGS, _settings(model, info))
        write_text(folder / _CARD, model_card(model, backbones, known))
        if plot := _reliability_plot(model):
            shutil.copyfile(plot, folder / _PLOT)
        list_files(folder)
        return put_in_place(folder, out, [*own, _PLOT])


def model_files(model: ScoreModel) -> list[str]:
    """Names of everything that :func:`write_model` may write for a model."""
    return [*_MODEL_FILES, *sorted({path.parts[0] for path in _own_backbones(model).values()})]


def write_model(model: ScoreModel, folder: Path, cache_dir: Path) -> list[str]:
    """Write a model, with its own fine-tuned backbones, and what `rank` tells with its help.

    Those are calibration, anchors, and the contents of the works that it was made with. What
    the run does not have, and its anchors where none can be chosen, is left out, which is told.

    Returns:
        What was written besides the model, in words.

    Raises:
        DataError, CheckpointError: the run's files are damaged.
    """
    members = [
        dataclasses.replace(m, info=None if m.info is None else shareable(m.info))
        for m in model.members
    ]
    path = save_members(folder, members, shareable(model.info), model.errors)
    for source, place in _own_backbones(model).items():
        _copy_backbone(source, folder / place)
    known = []
    calibration = load_calibration(model)
    if calibration.unknown is None:
        what = "percentiles and tiers" if calibration.ordinal else "percentiles"
        known.append(f"{what} learned from {calibration.images} held-out works")
    if calibration.source != "none":
        save_calibration(path, calibration)
    else:
        log.info("Probabilities do not go along: %s", calibration.unknown)
    if model.knows_grades:
        known.append("intervals of ranks")
    try:
        anchors = find_anchors(model, cache_dir)
        save_anchors(path, anchors, shared=True)
        known.append(f"win rates against {len(anchors['anchors'])} anchors (`rank --tiers`)")
    except (DataError, StoreError) as error:
        log.info("No anchors for win rates go along: %s", error)
    made_with = sorted(learned_from(model))
    if made_with:
        rows = [{"sha256": sha} for sha in made_with]
        write_csv(folder / MADE_WITH_FILE, ("sha256",), rows)
    return known


def refuse_existing(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Make sure that nothing is in the way.

    Raises:
        ConfigError: ``out`` is a file or a run's folder, or has one of the files.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    if (out / RUN_FILE).exists():
        raise ConfigError(
            f"{out} is a run's folder, whose files would be replaced; give another folder"
        )
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{out} already has {', '.join(there)}; give another folder, or --overwrite"
        )


def put_in_place(folder: Path, out: Path, own: Sequence[str]) -> list[Path]:
    """Put what is in ``folder`` in place in ``out``, after removing ``own`` there, of an earlier export.

    Returns:
        The new files.
    """
    for name in sorted(own, key=LIST_FILE.__ne__):  # the list first: a kill leaves no false one
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    moved = move_files(folder, out)
    files = [path for top in moved for path in (sorted(top.rglob("*")) if top.is_dir() else [top])]
    return [path for path in files if path.is_file()]


def shareable(info: ModelInfo) -> ModelInfo:
    """What a head expects, without the folders of this machine: a local backbone keeps its name alone."""
    backbone = info.embed.backbone
    local = Path(backbone).expanduser()
    if local.is_absolute() or backbone.startswith((".", "~")) or local.is_dir():
        backbone = local.name
    embed = dataclasses.replace(
        info.embed, backbone=backbone, cache_dir=EmbedConfig.cache_dir, workers=None
    )
    return dataclasses.replace(info, embed=embed, more=tuple(map(shareable, info.more)))


def _own_backbones(model: ScoreModel) -> dict[Path, Path]:
    """Folders of the backbones that were fine-tuned with the model → their place in its run."""
    run = model.checkpoint.resolve().parent
    infos = [member.info or model.info for member in model.members]
    folders = {Path(info.embed.backbone).expanduser() for info in infos}
    inside = [path.resolve() for path in folders if path.is_dir()]
    return {path: path.relative_to(run) for path in inside if run in path.parents}


def _copy_backbone(source: Path, target: Path) -> None:
    """Copy a backbone's settings and weights; who trained it where is left out."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name in _BACKBONE_FILES:
            values = read_json(path)
            write_json(
                target / path.name, {k: v for k, v in values.items() if k != "_name_or_path"}
            )
        elif ".safetensors" in path.name:
            shutil.copyfile(path, target / path.name)
    list_files(target)


def _settings(model: ScoreModel, info: ModelInfo) -> dict[str, Any]:
    head, widths = model.members[0].head, {}
    if isinstance(head, NumpyHead):
        widths = {
            "projector_hidden_dim": len(head.arrays["projector.layers.0.bias"]),
            "projector_output_dim": len(head.arrays["projector.layers.4.bias"]),
            "score_hidden_dim": len(head.arrays["score_head.layers.0.bias"]),
        }
    return {
        "library_name": "mirip-fast",
        "library_version": __version__,
        "members": len(model.members),
        **widths,
        **info.to_dict(),
    }


def model_card(model: ScoreModel, backbone: str, known: Sequence[str] = ()) -> str:
    """The model card as Markdown with the hub's metadata block; headings as of Mitchell et al. 2019.

    Every figure is read from the run's own files; where there is none, the card says so.

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
    # Of weights, pixels and libraries' settings: what `mirip-fast cache info` lists stores by.
    fingerprints = ", ".join(f"`{each.fingerprint_id}`" for each in info.backbones)
    parts = [
        _metadata(backbone),
        "# A grader's taste, as a ranking head",
        "Scores pictures so that those a particular grader would put higher score higher. It was trained "
        f"with mirip-fast on the pictures described below; it is {_kind(model)}.",
        f"- backbone: `{backbone}` (a score is refused if its weights are others)\n"
        f"- fingerprint of its features: {fingerprints}\n"
        f"- it looks at: {' and '.join(_tokens_text(kind) for kind in info.kinds)}\n"
        f"- views of each picture: {views}; made square by `{info.embed.resize}`\n"
        f"- {_readout(model)}\n"
        f"- tiers, best first: {', '.join(info.tiers) or 'none'}\n"
        f"- what it tells besides scores: {'; '.join(known) or 'nothing'}",
        "## Use",
        "With mirip-fast installed:\n\n"
        "```bash\nmirip-fast rank pictures/ --checkpoint THIS_FOLDER\n```\n\n"
        "```python\nimport mirip_fast as mf\n\n"
        'mf.load("THIS_FOLDER or user/name").rank("pictures/")\n```\n\n'
        "If the backbone lies in a folder of your own, add `--backbone FOLDER`.",
        "## Data",
        _data(model),
        _kept_of_works(model),
        "## How good it is",
        _accuracy(model),
        *_calibration(model),
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


def _calibration(model: ScoreModel) -> list[str]:
    if _reliability_plot(model) is None:
        return []
    return [
        f"![predicted probability against observed frequency]({_PLOT})\n\n"
        "How often the work with the higher score is the better one, by the probability that the model "
        "gives: on the dotted line probabilities come true."
    ]


def _reliability_plot(model: ScoreModel) -> Path | None:
    """The run's drawing of how well its probabilities hold; it names no work."""
    names = ("evaluation_test_reliability.png", "held_out_reliability.png")
    found = (model.checkpoint.parent / name for name in names)
    return next((path for path in found if path.is_file()), None)


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
    process = any(isinstance(member.head, GaussianProcess) for member in model.members)
    small = "a Gaussian process" if process else "a small head"
    return f"{small} on the features of a frozen backbone, which is not part of this folder"


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
    images = load_split(path, model.info.tiers)
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
        here = [s for s, t in zip(images.splits, images.tier_codes, strict=True) if t == number]
        counts = Counter(here)
        cells = " | ".join(str(counts[split]) for split in splits)
        lines.append(f"| {_cell(tier)} | {cells} | {len(here)} |")
    return "\n".join(lines)


def _groups(images: GradedImages) -> str:
    splits_of: dict[str, set[str]] = {}
    for group, split in zip(images.groups, images.splits, strict=True):
        if group is not None:
            splits_of.setdefault(group, set()).add(split)
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
            f"the evaluation in {model.checkpoint.parent} cannot be read ({error!r}); run "
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
            f"{path} cannot be read ({error}); run `mirip-fast evaluate` again"
        ) from error


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
