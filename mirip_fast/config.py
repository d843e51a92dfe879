"""The one source of defaults: a tree of dataclasses whose fields carry default, help and unit.

From this tree come the YAML files in ``configs/``, the command line options, ``mirip-fast config`` and
the option tables of the documentation. Precedence: defaults < YAML < command line.

A value of ``None`` is written ``auto`` in YAML and on the command line: the tool chooses and says what.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mirip_fast.errors import ConfigError
from mirip_fast.text import nfc

#: Settings of the working folder, read by every command where the file exists.
PROJECT_FILE = "mirip.yaml"
#: Kinds of pairwise loss; models/losses.py computes them.
LOSSES = ("margin", "logistic")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    flag: str | None = None,
    several: bool = False,
) -> Any:
    """Declare a setting: a dataclass field with its documentation.

    Args:
        default: the value when nothing is said; ``None`` stands for ``auto``.
        help: one sentence for help texts and tables, with the unit.
        choices: the accepted words, for settings that name one of a few things.
        low: the smallest accepted number.
        high: the largest accepted number.
        flag: the command line name, where it is not the field's name.
        several: the flag may be given several times; the values are joined by commas.
    """
    metadata = {
        "help": help, "choices": choices, "low": low, "high": high, "flag": flag, "several": several,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """What the images and their grades are called."""

    tiers: str = option("S,A,B,C", "Tier names, best first, separated by commas.")
    id_column: str = option("image_id", "CSV column with the image's name.")
    image_column: str | None = option(
        None, "CSV column with the image file (auto: filename, else image_path)."
    )
    tier_column: str = option("tier", "CSV column with the tier.")
    score_column: str = option("tier_score", "CSV column with a grade finer than the tier.")
    group_column: str = option(
        "group", "CSV column naming images that must stay in one split (one applicant, one post)."
    )
    grader_column: str = option(
        "grader", "CSV column naming who gave the tier, where a work has a row per grader."
    )
    by: str | None = option(
        None,
        "CSV column with the name of each work's applicant; folder: a folder per applicant. Works of one "
        "stay in one split, and are ranked and evaluated together (auto: no applicants).",
    )
    applicants: str | None = option(
        None, "CSV file with a row per applicant: the column of --by, and the tier (auto: none)."
    )
    image_root: str | None = option(
        None,
        "Folder that image files are relative to (auto: the CSV's folder and its images/); files elsewhere "
        "are refused.",
    )
    separator: str | None = option(None, "CSV separator (auto: found out from the file).")
    encoding: str = option("utf-8", "CSV encoding, with or without a byte order mark.")
    sheet: str | None = option(
        None,
        "Sheet of an Excel workbook, where one describes the images (auto: the first not hidden).",
    )

    #: Whether tiers, scores and groups are read; without, their columns are like any other.
    with_grades: ClassVar[bool] = True

    def tier_names(self) -> tuple[str, ...]:
        """The names of the tiers, best first.

        Raises:
            ConfigError: no tiers, an empty tier name, or one twice.
        """
        names = tuple(nfc(name.strip()) for name in self.tiers.split(","))
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(
                f"--tiers {','.join(names)!r}: different names are expected, best first, "
                "separated by commas, such as S,A,B,C"
            )
        return names

    def as_read(self) -> DataConfig:
        """The same in the form that tables are read in: names composed, ``tab`` as a tab."""
        columns = {
            k: v for k, v in vars(self).items() if v and (k == "by" or k.endswith("_column"))
        }
        names: dict[str, Any] = {k: nfc(v.strip() if k == "by" else v) for k, v in columns.items()}
        separator = {"tab": "\t", "\\t": "\t"}.get(self.separator or "", self.separator)
        return dataclasses.replace(self, **{**names, "separator": separator})


@dataclass
class SplitConfig:
    """How graded images are divided into train, val and test."""

    train_ratio: float = option(0.8, "Share of the images to train on.", low=0, high=1)
    val_ratio: float = option(0.1, "Share of the images to validate on.", low=0, high=1)
    test_ratio: float = option(0.1, "Share of the images to test on.", low=0, high=1)
    split_seed: int = option(42, "Seed of the split.", low=0)
    near_groups: str | None = option(
        None,
        "CSV file of near duplicates that stay in one split, as audit writes it (auto: none; equal "
        "files always stay together).",
    )


@dataclass
class EmbedConfig:
    """Phase one: which backbone looks at the images, and how."""

    backbone: str = option(
        "facebook/dinov2-large",
        "Hugging Face name or local directory of the backbone; tiny-random is a built-in untrained "
        "one for trying the tool out. embed and train --head-only take several, whose features are "
        "learned from side by side.",
        several=True,
    )
    image_size: int = option(
        768, "Side of the square image, in pixels; rounded down to whole patches.", low=1
    )
    resize: str = option(
        "squash",
        "How an image becomes square: squash it, pad it with white, or crop its centre.",
        choices=("squash", "pad", "crop"),
    )
    patches: str = option(
        "mean",
        "Patch features kept beside the CLS token: none, their mean, mean and standard deviation (std), a "
        "K×K grid of means (grid:K), or all of them.",
    )
    layers: str = option(
        "auto",
        "Blocks after which CLS token and patch mean are kept besides the last one's: last (none), auto "
        "(each quarter of the depth), or numbers of blocks or fractions of the depth, separated by commas.",
    )
    tta: str = option(
        "none",
        "Test-time augmentation: which views of an image are kept (full = flip × scales).",
        choices=("none", "flip", "scales", "full"),
    )
    precision: str = option(
        "auto",
        "Number format of the backbone's arithmetic (auto: bf16 on a GPU that has it, fp16 on one "
        "that has not, fp32 on a CPU).",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    store_dtype: str = option(
        "float16", "Number format of the stored features.", choices=("float16", "float32")
    )
    decode: str = option(
        "fast",
        "fast reads a JPEG at reduced scale where that leaves twice the target size; exact never.",
        choices=("fast", "exact"),
    )
    colours: str = option(
        "srgb",
        "srgb applies the colour profiles of pictures (phones' wide gamut, CMYK); stored leaves the numbers "
        "as they are in the file, as caches of earlier versions have them.",
        choices=("srgb", "stored"),
    )
    embed_batch_size: int | None = option(
        None,
        "Images per forward pass (auto: by the device's memory).",
        low=1,
        flag="--batch-size",
    )
    workers: int | None = option(
        None, "Processes that read and decode images; 0 decodes in the main process.", low=0
    )
    max_megapixels: float = option(
        89.5,
        "Largest picture that is decoded, in millions of pixels; larger JPEGs are read at reduced scale.",
        low=1,
        high=1000,
    )
    compile: bool = option(
        False,
        "Let torch.compile make code for the backbone: a minute or more at the start, faster passes "
        "on a GPU.",
    )
    cache_dir: str = option("cache", "Folder of the feature stores.")


@dataclass
class HeadConfig:
    """The small network that is trained: projector and score head."""

    features: str = option(
        "auto",
        "What the head sees: cls (the CLS token), mean (of the patch tokens), or kinds joined by +, also of "
        "other blocks, such as cls_9+cls (auto: cls+mean where both are stored; a Gaussian process chooses "
        "among all stored layers).",
    )
    projector_hidden_dim: int = option(512, "Width of the projector's hidden layer.", low=1)
    projector_output_dim: int = option(256, "Width of the projector's output.", low=1)
    score_hidden_dim: int = option(64, "Width of the score head's hidden layer.", low=1)
    projector_dropout: float = option(0.1, "Dropout in projector and score head.", low=0, high=0.99)
    readout: str = option(
        "usual",
        "What learns from the rows: gp (a Gaussian process: no setting to choose, seconds), head (projector "
        "and score head with the pairwise loss), attention (such a head over learned queries that look at "
        "patch tokens, which `embed --patches grid:7` keeps), auto (the best of these by cross-validation), "
        "ensemble (all of them, averaged); usual: gp, or head where a setting is given that only a head "
        "heeds, or a file of 1,000 judged pairs and more.",
        choices=("usual", "gp", "head", "attention", "auto", "ensemble"),
    )


@dataclass
class TrainConfig:
    """Phase two: how the head learns."""

    name: str | None = option(None, "Name of the run (auto: gp or head).")
    output_dir: str = option("runs", "Folder of the runs.")
    preset: str = option(
        "auto",
        "Where batch size, learning rate and epochs come from when they are not given: auto chooses "
        "by the number of training images, none takes 32, 1e-4 and 100.",
        choices=("auto", "none"),
    )
    pairs: str = option(
        "all",
        "Which pairs an epoch sees: all pairs among the images of each batch, sampled (one drawn "
        "pair per training image, the classic recipe), or those of a CSV file with the columns "
        "image_path_1, image_path_2, label (1: the first is better, -1: the second, 0: a tie) and, "
        "if wanted, weight; several files are all read.",
        several=True,
    )
    pairs_zero: str | None = option(
        None,
        "What the label 0 means in pairs files without -1: a tie, or that the second image is better "
        "(auto: a tie, with a warning).",
        choices=("tie", "second"),
    )
    label: str = option(
        "tier",
        "What makes one image better than another: its tier, or its tier_score; pairs: the judged pairs of "
        "--pairs FILE.csv alone, which else join the grades.",
        choices=("tier", "tier_score", "pairs"),
    )
    loss: str = option(
        "margin",
        "Pairwise loss: margin (ranking hinge) or logistic (RankNet).",
        choices=LOSSES,
    )
    margin: float = option(1.0, "How far apart the margin loss pushes two scores.", low=0)
    label_smoothing: float = option(
        0.0,
        "With --loss logistic: how far the better image's chance of winning is moved from 1 towards "
        "1/2; 1 moves it all the way.",
        low=0,
        high=1,
    )
    epochs: int | None = option(
        None, "Passes over the training images, at most (auto: preset).", low=1
    )
    batch_size: int | None = option(
        None, "Images per step with --pairs all, else pairs per step (auto: preset).", low=2
    )
    learning_rate: float | None = option(None, "Peak learning rate of AdamW (auto: preset).", low=0)
    weight_decay: float = option(0.01, "Weight decay, on matrices only.", low=0)
    beta1: float = option(0.9, "AdamW's first beta.", low=0, high=1)
    beta2: float = option(0.999, "AdamW's second beta.", low=0, high=1)
    eps: float = option(1e-8, "AdamW's epsilon.", low=0)
    warmup_steps: int = option(0, "Steps of linear warm-up before the cosine.", low=0)
    scheduler_eta_min: float = option(1e-6, "Learning rate at the end of the cosine.", low=0)
    gradient_clip_norm: float = option(1.0, "Largest gradient norm; 0 turns clipping off.", low=0)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", low=1)
    early_stopping_patience: int | None = option(
        None,
        "Epochs without a better validation accuracy before training stops; 0 never stops (auto: 10, "
        "more where 10 epochs are fewer than 300 steps).",
        low=0,
    )
    early_stopping_min_delta: float = option(
        0.0, "Smallest gain in validation accuracy that counts as better.", low=0
    )
    ema_decay: float = option(
        0.0,
        "Judge and keep a moving average of the weights; the share of it that stays at each step, "
        "such as 0.999 (0: off).",
        low=0,
        high=0.999999,
    )
    swa_start: int = option(
        0,
        "Judge and keep the mean of the weights at the end of this epoch and all later ones, which "
        "keep its learning rate (0: off).",
        low=0,
    )
    folds: int = option(
        0,
        "Divide train and val into so many folds, train one head (with --full one model) without each, "
        "and score with all of them; the test split stays out (0: no folds).",
        low=0,
    )
    save_every_n_epochs: int = option(
        5, "Epochs between numbered checkpoints; 0 keeps none.", low=0
    )
    save_total_limit: int = option(3, "Numbered checkpoints kept.", low=1)
    seed: int = option(42, "Seed of weights, batches and dropout.", low=0)


@dataclass
class FinetuneConfig:
    """End to end: how backbone and head learn together (`train --full`)."""

    strategy: str = option(
        "full",
        "What learns: full (everything), last:N (the last N blocks), llrd (everything, lower layers "
        "more slowly), gradual (from the head downwards), or lora (small matrices beside the "
        "attention's).",
    )
    layer_decay: float = option(
        0.8,
        "llrd: each block's learning rate as a share of the next one's; 0.65-0.9 is sensible.",
        low=0,
        high=1,
    )
    unfreeze: str = option(
        "1:0,3:2,5:all",
        "gradual: from which epoch how many of the last blocks learn, as EPOCH:BLOCKS.",
    )
    lora_rank: int = option(16, "lora: rank of the added matrices.", low=1)
    lora_alpha: float = option(32.0, "lora: their scale is alpha / rank.", low=0)
    lora_targets: str | None = option(
        None,
        "lora: linear layers of a block that get them, by the end of their names (auto: all of the "
        "attention's).",
    )
    init_from: str | None = option(
        None,
        "Head-only run to start from; it brings its split along. none starts with a random head "
        "(auto: the newest one of the same data).",
    )
    head_epochs: int | None = option(
        None,
        "First epochs in which only the head learns (auto: 0 after a head-only run, else 1).",
        low=0,
    )
    head_learning_rate: float | None = option(
        None,
        "Learning rate of projector and score head (auto: 1e-4; with llrd that of the last block's "
        "successor, --learning-rate).",
        low=0,
    )
    warmup_share: float = option(
        0.1,
        "Share of all steps in which the learning rate rises, where --warmup-steps is 0.",
        low=0,
        high=1,
    )
    augment: str = option(
        "light",
        "Augmentation of training images: light crops and mirrors, strong also rotates, changes "
        "colours and applies two random operations.",
        choices=("none", "light", "strong"),
    )
    mixup: float = option(
        0.0, "Mixup: alpha of the Beta distribution of the shares; 0 is off, 0.2 is usual.", low=0
    )
    cutmix: float = option(
        0.0, "CutMix: alpha of the Beta distribution of the areas; 0 is off, 1 is usual.", low=0
    )
    patch_dropout: float = option(
        0.0, "Share of patch tokens left out in training; 0.5 is usual.", low=0, high=0.95
    )
    stochastic_depth: float = option(
        0.0,
        "Probability of leaving out the last block in training; falls to 0 at the first one.",
        low=0,
        high=0.95,
    )
    accumulation_steps: int | None = option(
        None,
        "Micro-batches that a step's batch is divided into; the gradient stays that of the whole "
        "batch (auto: 1, doubled when memory runs out).",
        low=1,
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations twice instead of keeping them: less memory, about a third slower.",
    )
    compile: bool = option(False, "Compile the model (torch.compile): slow start, faster steps.")
    cache_images: bool = option(False, "Keep the decoded images in memory.")
    loader_workers: int = option(
        4, "Processes that decode and augment training images; 0 does it in the main one.", low=0
    )
    prefetch: int = option(2, "Batches that each of them prepares ahead.", low=1)
    remote_sync: str | None = option(
        None,
        "Folder or fsspec URL (s3://bucket/runs) that checkpoints, and what resuming needs, are copied to.",
    )


@dataclass
class TrackingConfig:
    """Where a run is reported, besides its folder."""

    report_to: str = option("none", "Trackers, separated by commas: wandb, tensorboard, none.")
    wandb_project: str = option("mirip-ranking", "wandb project.")
    wandb_run_name: str | None = option(None, "wandb run name (auto: the run folder's name).")
    wandb_entity: str | None = option(None, "wandb user or team (auto: the one logged in).")
    wandb_tags: str = option("", "wandb tags, separated by commas.")
    wandb_notes: str = option("", "wandb notes.")
    wandb_pictures: bool = option(
        False, "Send the worst mistakes to wandb, with thumbnails and names of works and groups."
    )
    wandb_log_model: bool = option(False, "Send the best model to wandb as an artifact.")


@dataclass
class EvaluateConfig:
    """How a model is judged."""

    bootstrap_rounds: int = option(1000, "Bootstrap rounds behind each interval.", low=0)
    within: str | None = option(
        None,
        "CSV column inside which comparisons are fair: training takes its pairs from inside one value "
        "of it, judging tells their accuracy too (auto: all images together; a run is judged as it was "
        "trained).",
    )
    portfolio: str | None = option(
        None,
        "How works make an applicant's score: mean, median, or best:K, the mean of the best K (auto: what "
        "orders graded applicants best that were not trained on, else the mean).",
    )
    grader: str | None = option(
        None,
        "One of several graders, whose tiers alone are learned or judged by (auto: all; a run is judged "
        "as it was trained).",
    )


@dataclass
class AuditConfig:
    """What counts as a near duplicate, and what an audit finds fault with."""

    near_cosine: float = option(
        0.95,
        "Cosine of two images' CLS features from which on they are near duplicates; lower finds more "
        "crops, and works that only look alike.",
        low=0,
        high=1,
    )
    disagreement: float = option(
        0.75,
        "An image is reported when its held-out score contradicts its tier in this share of the "
        "comparisons with other tiers.",
        low=0,
        high=1,
    )
    fail_on: str = option(
        "error",
        "Findings that end with status 1: error, warning, note (each with those above it), none, or "
        "kinds of findings separated by commas.",
    )


@dataclass
class ExplainConfig:
    """How a score is explained."""

    map: str = option(
        "occlusion",
        "What the map of a picture shows: occlusion (by how much the score changes when a region is blurred "
        "away; passes of the backbone) or attention (where a head of `train --readout attention` looks, at "
        "once from the cached patch tokens; where it looks is not why).",
        choices=("occlusion", "attention"),
    )

    detail: int = option(
        8,
        "Steps along each edge of a map of occlusion; N take (N − 1)² passes of the backbone.",
        low=2,
        high=100,
    )


@dataclass
class ExportConfig:
    """How an exported model is checked before it is kept."""

    check_images: int = option(
        32, "Images of the run that an exported model is compared with torch on.", low=2
    )
    tolerance: float = option(
        1e-3, "Largest difference of a score from torch's before an export is refused.", low=0
    )
    int8: bool = option(False, "Write a model with 8-bit matrices, too, and tell how ranks agree.")


@dataclass
class LabelConfig:
    """Judging and grading works on a local page."""

    judge: str | None = option(
        None,
        "Name of who judges, written beside each judgement; given several times, each gets an address "
        "(auto: the name of the login).",
        several=True,
    )
    measure_share: float = option(
        0.25,
        "Share of the pairs drawn at random among works that are kept from training (the val and test "
        "splits): they say how good the head is, and choose its best epoch.",
        low=0,
        high=0.9,
    )
    repeat_share: float = option(
        0.05,
        "Share of the pairs that are shown a second time, sides swapped, to tell how consistent the "
        "judge is.",
        low=0,
        high=0.5,
    )
    retrain_every: int = option(
        10, "New judgements after which the head is trained again, in the background.", low=1
    )
    choose: str = option(
        "random",
        "Which pairs are shown to learn from: random, or informative (those that are expected to tell most).",
        choices=("random", "informative"),
    )


@dataclass
class RuntimeConfig:
    """The machine."""

    device: str = option("auto", "cpu, cuda, cuda:1, mps (auto: the best one here).")


@dataclass
class Config:
    """All settings; each section is a dataclass of options."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dict: section → setting → value."""
        return dataclasses.asdict(self)
