"""The documented Python interface: its code blocks run one after the other.

Only the import lines are changed, and what SUBSTITUTIONS lists: a local backbone, the CPU, small sizes,
wandb off, one variable that the document leaves undefined.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mirip_fast_cli.main import run
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from mirip_fast import (
    Evaluator,
    PairwiseDataset,
    PairwiseRankingModel,
    PerformanceBenchmarks,
    Trainer,
    TrainingConfig,
    batch_compare,
)
from mirip_fast.errors import BackboneError, CheckpointError, ImageError, TrainingError
from mirip_fast.models.checkpoint import KEYS, load_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss, pair_loss

BLOCKS = (
    """
from mirip_fast import DataSplitter
import pandas as pd

metadata = pd.read_csv("data/metadata.csv")
splitter = DataSplitter(
    train_ratio=0.8,
    val_ratio=0.1,
    test_ratio=0.1,
    seed=42,
    stratify_column="tier"
)
train_df, val_df, test_df = splitter.split(metadata)
train_df.to_csv("data/train_metadata.csv", index=False)
val_df.to_csv("data/val_metadata.csv", index=False)
test_df.to_csv("data/test_metadata.csv", index=False)
""",
    """
from mirip_fast import PairwiseDataset
from torchvision import transforms

transform = transforms.Compose([
    transforms.Resize((768, 768)),
    transforms.ToTensor(),
    transforms.Normalize(
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225]
    )
])
train_dataset = PairwiseDataset(
    metadata=train_df,
    image_dir="data/images",
    transform=transform
)
print(f"{len(train_dataset)}")
""",
    """
from mirip_fast import Trainer, TrainingConfig, PairwiseRankingModel
from torch.utils.data import DataLoader

config = TrainingConfig(
    learning_rate=1e-4,
    weight_decay=0.01,
    batch_size=32,
    max_epochs=100,
    gradient_clip_norm=1.0,
    early_stopping_patience=10,
    scheduler_t_max=100,
    scheduler_eta_min=1e-6,
    checkpoint_dir="./checkpoints",
    save_every_n_epochs=5,
    wandb_enabled=True,
    wandb_project="mirip-ranking",
    device="cuda",
    seed=42,
)
model = PairwiseRankingModel(
    backbone_name="facebook/dinov2-large",
    projector_output_dim=256,
    freeze_backbone=True
)
train_loader = DataLoader(train_dataset, batch_size=32, shuffle=True)
val_loader = DataLoader(val_dataset, batch_size=32, shuffle=False)
trainer = Trainer(model=model, config=config)
trainer.fit(train_loader, val_loader)
""",
    """
trainer = Trainer(model=model, config=config)
trainer.load_checkpoint("checkpoints/last_model.pt")
trainer.fit(train_loader, val_loader)
""",
    """
import torch
from mirip_fast import Evaluator
from torch.utils.data import DataLoader

model = PairwiseRankingModel()
checkpoint = torch.load("checkpoints/best_model.pt")
model.load_state_dict(checkpoint["model_state_dict"])
evaluator = Evaluator(model=model, device="cuda")
test_loader = DataLoader(test_dataset, batch_size=32, shuffle=False)
accuracy = evaluator.evaluate(test_loader)
print(f"{accuracy:.2%}")
detailed_results = evaluator.evaluate_detailed(test_loader)
print(f"{detailed_results['total_pairs']}")
print(f"{detailed_results['correct_predictions']}")
""",
    """
import torch
from PIL import Image
from torchvision import transforms

model = PairwiseRankingModel()
checkpoint = torch.load("checkpoints/best_model.pt")
model.load_state_dict(checkpoint["model_state_dict"])
model.eval()
transform = transforms.Compose([
    transforms.Resize((768, 768)),
    transforms.ToTensor(),
    transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
])
img1 = transform(Image.open("image1.jpg")).unsqueeze(0)
img2 = transform(Image.open("image2.jpg")).unsqueeze(0)
with torch.no_grad():
    score1, score2 = model(img1.cuda(), img2.cuda())
if score1 > score2:
    print(f"{(score1 - score2).item():.4f}")
else:
    print(f"{(score2 - score1).item():.4f}")
""",
    """
from mirip_fast import batch_compare
compared = batch_compare(model, [("image1.jpg", "image2.jpg")], transform, device="cuda")
""",
    """
from mirip_fast import PerformanceBenchmarks, set_seed

set_seed(42)
benchmarks = PerformanceBenchmarks(model=model, device="cuda")
report = benchmarks.run_full_benchmark()
print(f"{report['inference_time_ms']:.2f}ms/pair")
print(f"{report['memory_usage_gb']:.2f}GB")
print(f"{report['meets_inference_requirement']}")
print(f"{report['meets_memory_requirement']}")
""",
    """
config = TrainingConfig(
    learning_rate=5e-5,
    weight_decay=0.001,
)
config = TrainingConfig(
    warmup_steps=500,
    learning_rate=1e-4,
)
model = PairwiseRankingModel(
    projector_dropout=0.3,
)
""",
    """
from torch.amp import autocast, GradScaler

scaler = GradScaler("cpu", enabled=False)
optimizer = torch.optim.AdamW(model.trainable_parameters())
for img1, img2, labels in train_loader:
    with autocast("cpu"):
        score1, score2 = model(img1, img2)
        loss = model.compute_loss(score1, score2, labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    break
""",
    """
class CachedPairwiseDataset(PairwiseDataset):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cache = {}

    def _load_image(self, path):
        if path not in self.cache:
            self.cache[path] = super()._load_image(path)
        return self.cache[path]

cached = CachedPairwiseDataset(metadata=train_df, image_dir="data/images", transform=transform)
first, again = cached[0], cached[0]
""",
)

SUBSTITUTIONS = {
    '"facebook/dinov2-large"': '"tiny-random"',
    "PairwiseRankingModel()": 'PairwiseRankingModel("tiny-random")',
    "    projector_dropout=0.3,": '    backbone_name="tiny-random", projector_dropout=0.3,',
    '"cuda"': '"cpu"',
    ".cuda()": ".cpu()",
    "wandb_enabled=True": "wandb_enabled=False",
    "max_epochs=100": "max_epochs=2",
    "(768, 768)": "(42, 42)",
    'PerformanceBenchmarks(model=model, device="cpu")': (
        'PerformanceBenchmarks(model=model, device="cpu", image_size=42, batch_size=2)'
    ),
    # The document uses datasets of the other splits without making them.
    "train_loader = DataLoader(train_dataset": (
        'val_dataset = PairwiseDataset(val_df, "data/images", transform)\n'
        'test_dataset = PairwiseDataset(test_df, "data/images", transform)\n'
        "train_loader = DataLoader(train_dataset"
    ),
}


def make_images(folder: Path, n: int = 40) -> pd.DataFrame:
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        pixels = np.clip(rng.normal(230 - 50 * (i % 4), 15, (48, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"image_{i:03d}.jpg")
        rows.append((f"img_{i:03d}", f"image_{i:03d}.jpg", "SABC"[i % 4]))
    table = pd.DataFrame(rows, columns=["image_id", "filename", "tier"])
    table.to_csv(folder / "metadata.csv", index=False)
    return table


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "data")
    for number in (1, 2):
        picture = tmp_path / "data" / "images" / f"image_00{number}.jpg"
        (tmp_path / f"image{number}.jpg").write_bytes(picture.read_bytes())
    return tmp_path


def test_the_documents_code_runs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        code = block
        for old, new in SUBSTITUTIONS.items():
            code = code.replace(old, new)
        exec(compile(code, "<document>", "exec"), namespace)
    assert {p.name for p in (work / "checkpoints").iterdir()} == {"best_model.pt", "last_model.pt"}
    checkpoint = torch.load("checkpoints/last_model.pt", weights_only=True)
    assert set(checkpoint) == {*KEYS, "model", "training_state"} and isinstance(
        checkpoint["config"], dict
    )
    assert not [key for key in checkpoint["model_state_dict"] if key.startswith("backbone.")]
    (compared,) = namespace["compared"]  # type: ignore[misc]
    assert set(compared) == {"image1", "image2", "score1", "score2", "winner", "confidence"}
    assert compared["confidence"] == pytest.approx(abs(compared["score1"] - compared["score2"]))
    results = namespace["detailed_results"]
    assert results["accuracy"] == results["correct_predictions"] / results["total_pairs"]  # type: ignore[index]
    assert torch.equal(namespace["first"][0], namespace["again"][0])  # type: ignore[index]


def loaders(work: Path) -> tuple[DataLoader, DataLoader]:  # type: ignore[type-arg]
    table = pd.read_csv(work / "data" / "metadata.csv")
    transform = transforms.Compose([transforms.Resize((28, 28)), transforms.ToTensor()])
    dataset = PairwiseDataset(table, work / "data" / "images", transform)
    return DataLoader(dataset, batch_size=8), DataLoader(dataset, batch_size=8)


def test_an_image_whose_side_is_no_multiple_of_the_patch_is_resized(work: Path) -> None:
    model = PairwiseRankingModel("tiny-random").eval()
    image = Image.open(work / "image1.jpg")
    with torch.inference_mode():
        for side, whole in ((48, 42), (55, 42), (56, 56)):
            odd, even = (
                transforms.functional.to_tensor(image.resize((n, n), Image.Resampling.BICUBIC))
                for n in (side, whole)
            )
            a, b = model.extract(odd[None]), model.extract(even[None])
            assert torch.nn.functional.cosine_similarity(a, b) > 0.97
        # The strip at the right and bottom edge is seen: a plain crop would ignore it.
        black, marked = torch.zeros(1, 3, 48, 48), torch.zeros(1, 3, 48, 48)
        marked[..., 42:] = 1
        assert not torch.allclose(model.extract(black), model.extract(marked), atol=1e-3)


def test_batch_compare_names_the_file_that_it_can_not_read(
    work: Path, decoded_elsewhere: Callable[[], None]
) -> None:
    decoded_elsewhere()
    model = PairwiseRankingModel("tiny-random")
    transform = transforms.Compose([transforms.Resize((28, 28)), transforms.ToTensor()])
    (found,) = batch_compare(model, [("image1.jpg", "image2.jpg")], transform)
    assert found["confidence"] == pytest.approx(abs(found["score1"] - found["score2"]))
    (work / "torn.jpg").write_bytes((work / "image1.jpg").read_bytes()[:600])
    with pytest.raises(ImageError, match=r"torn\.jpg: "):
        batch_compare(model, [("image1.jpg", "torn.jpg")], transform)


def test_a_backbone_learns_and_is_saved_unless_it_is_frozen(work: Path) -> None:
    model = PairwiseRankingModel("tiny-random")
    model.train()
    assert not model.backbone.training and model.projector.training
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    train, val = loaders(work)
    Trainer(model, TrainingConfig(max_epochs=1, learning_rate=1e-2, device="cpu")).fit(train, val)
    assert all(torch.equal(before[k], v) for k, v in model.backbone.state_dict().items())
    model = PairwiseRankingModel("tiny-random", freeze_backbone=False)
    Trainer(model, TrainingConfig(max_epochs=1, device="cpu")).fit(train, val)
    state = load_checkpoint(work / "checkpoints" / "best_model.pt")["model_state_dict"]
    assert any(key.startswith("backbone.") for key in state)
    with pytest.raises(RuntimeError, match=r"backbone\."):
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("backbone.")})


def test_a_resumed_trainer_ends_with_the_same_weights(work: Path) -> None:
    train, val = loaders(work)

    def config(folder: str, epochs: int) -> TrainingConfig:
        return TrainingConfig(
            max_epochs=epochs, scheduler_t_max=4, checkpoint_dir=folder, device="cpu",
            early_stopping_patience=0,
        )  # fmt: skip

    torch.manual_seed(0)
    start = PairwiseRankingModel("tiny-random")
    weights = {k: v.clone() for k, v in start.state_dict().items()}
    Trainer(start, config("whole", 4)).fit(train, val)
    part = PairwiseRankingModel("tiny-random")
    part.load_state_dict(weights)
    Trainer(part, config("part", 2)).fit(train, val)
    again = PairwiseRankingModel("tiny-random")
    trainer = Trainer(again, config("part", 4))
    trainer.load_checkpoint("part/last_model.pt")
    trainer.fit(train, val)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in start.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(work: Path) -> None:
    train, val = loaders(work)
    model = PairwiseRankingModel("tiny-random")
    trainer = Trainer(model, TrainingConfig(max_epochs=1, device="cpu"))
    trainer.fit(train, val)
    saved = (work / "checkpoints" / "last_model.pt").read_bytes()
    trainer.config.max_epochs = 2
    with torch.no_grad():
        next(model.score_head.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="learning_rate"):
        trainer.fit(train, val)
    assert (work / "checkpoints" / "last_model.pt").read_bytes() == saved


class AuthorsModel(torch.nn.Module):
    """What the authors of the document have: plain ``nn.Module``, scores [B, 1]."""

    def __init__(self, shape: tuple[int, ...] = (-1, 1)):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.shape = shape

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, two = (self.linear(x.mean((2, 3))).reshape(self.shape) for x in (first, second))
        return one, two


@pytest.mark.parametrize("label_shape", [(8,), (8, 1)])
@pytest.mark.parametrize("score_shape", [(-1,), (-1, 1)])
def test_scores_and_labels_of_either_shape_are_the_same_pairs(
    score_shape: tuple[int, ...], label_shape: tuple[int, ...]
) -> None:
    model = AuthorsModel(score_shape)
    torch.nn.init.ones_(model.linear.weight)
    first = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 2)
    labels = torch.tensor([1.0, 1, 1, -1, -1, -1, -1, -1])
    loader = [(first, torch.zeros_like(first) + 0.5, labels.reshape(label_shape))]
    found = Evaluator(model, "cpu").evaluate_detailed(loader)  # right: the second and the third
    assert (found["total_pairs"], found["accuracy"]) == (8, 0.25)
    score1, score2 = model(*loader[0][:2])
    expected = pair_loss(score1.flatten(), score2.flatten(), labels)
    assert torch.equal(pair_loss(score1, score2, loader[0][2]), expected)
    assert torch.equal(
        PairLoss()(score1, torch.arange(8).reshape(label_shape)),
        PairLoss()(score1.flatten(), torch.arange(8)),
    )


@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2), (1, 8)])
def test_scores_of_another_shape_are_refused_by_their_shape(shape: tuple[int, ...]) -> None:
    images, labels = torch.zeros(8, 3, 2, 2), torch.ones(8)
    model = AuthorsModel(shape)
    benchmarks = PerformanceBenchmarks(model, "cpu", image_size=2, batch_size=8)
    for call in (
        lambda: Evaluator(model, "cpu").evaluate([(images, images, labels)]),
        benchmarks.measure_training_step,
        lambda: pair_loss(*model(images, images), labels),
        lambda: PairLoss()(model(images, images)[0], torch.arange(8)),
    ):
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
            call()
    with pytest.raises(ValueError, match=r"labels must be .*\[8, 2\]"):
        Evaluator(AuthorsModel(), "cpu").evaluate([(images, images, torch.ones(8, 2))])


def test_any_module_is_trained_measured_and_compared(work: Path) -> None:
    train, val = loaders(work)
    model = AuthorsModel()
    before = model.linear.weight.detach().clone()
    Trainer(model, TrainingConfig(max_epochs=1, device="cpu")).fit(train, val)
    assert not torch.equal(before, model.linear.weight)
    report = PerformanceBenchmarks(model, "cpu", image_size=8, batch_size=2).run_full_benchmark()
    assert report["inference_time_ms"] > 0
    pairs = [("image1.jpg", "image2.jpg"), ("image2.jpg", "image1.jpg")]
    one, two = batch_compare(model, pairs, transforms.ToTensor(), "cpu")
    assert one["score1"] == two["score2"] and {one["winner"], two["winner"]} == {"image1", "image2"}


def test_the_documents_inference_loads_a_command_line_run(headed: Path) -> None:
    (path,) = headed.glob("runs/*/best_model.pt")
    checkpoint = torch.load(path)
    model = PairwiseRankingModel()
    model.load_state_dict(checkpoint["model_state_dict"])
    again = PairwiseRankingModel.from_checkpoint(path.parent)
    head = RankingHead(2 * model.spec.hidden_size, model.head_config)
    head.load_state_dict(checkpoint["model_state_dict"])
    x = torch.rand(2, 3, 28, 28)
    for loaded in (model.eval(), again.eval()):
        assert loaded.features == "cls+mean" and loaded.spec.name == "tiny-random"
        assert torch.equal(loaded.score(x), head.eval()(loaded.extract(x)))


def test_commands_read_what_trainer_wrote(headed: Path) -> None:
    train, val = loaders(headed)
    model = PairwiseRankingModel("tiny-random")
    config = TrainingConfig(max_epochs=1, checkpoint_dir="checkpoints", device="cpu")
    Trainer(model, config).fit(train, val)
    graded = ["--test-data", "data/metadata.csv", "--image-dir", "data/images"]
    assert run(["evaluate", "--checkpoint", "checkpoints/best_model.pt", *graded]) == 0
    assert run(["rank", "data/images", "--checkpoint", "checkpoints/best_model.pt"]) == 0
    assert len(pd.read_csv("ranking.csv")) == 40


def foreign(path: Path, **more: object) -> PairwiseRankingModel:
    """Write a checkpoint as the document's own project does; returns the same model."""
    model = PairwiseRankingModel("tiny-random")
    state = {
        name.replace("score_head.layers.", "score_head.").replace(".layers.", ".net."): value
        for name, value in model.state_dict().items()
    }
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "model_state_dict": wrapped, **more}, path)
    return model


def test_a_published_checkpoint_is_imported_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("training.config")
    settings = type("TrainingConfig", (), {"__module__": "training.config"})
    module.TrainingConfig = settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training", types.ModuleType("training"))
    monkeypatch.setitem(sys.modules, "training.config", module)
    config = settings()
    config.learning_rate = 1e-4
    path = tmp_path / "best_model.pt"
    model = foreign(path, config=config)
    monkeypatch.delitem(sys.modules, "training.config")
    again = PairwiseRankingModel.from_checkpoint(path, "tiny-random")
    x = torch.rand(2, 3, 28, 28)
    assert torch.equal(model.eval().score(x), again.eval().score(x))
    assert load_checkpoint(path, ())["config"] == {"learning_rate": 1e-4}


def test_weights_of_another_architecture_or_backbone_are_refused(headed: Path) -> None:
    state = PairwiseRankingModel("tiny-random").state_dict()
    state["score_head.5.weight"] = state.pop("score_head.layers.3.weight")
    state["score_head.4.weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match=r"score_head here is Linear.*score_head\.4\.weight"):
        PairwiseRankingModel("tiny-random").load_state_dict(state)
    with pytest.raises(BackboneError):  # nothing was loaded, and the default one is not here
        PairwiseRankingModel()(torch.zeros(1, 3, 28, 28), torch.zeros(1, 3, 28, 28))


def test_a_wandb_setting_asks_for_wandb_and_the_folder_of_images_means_its_data_set(
    headed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(headed)
    started = []
    monkeypatch.setattr(
        "mirip_fast.training.trackers.WandbTracker",
        lambda config, *_: started.append(config.wandb_project),
    )
    options = ["--head-only", "--data-dir", "data/images", "--epochs", "1"]
    assert run(["train", *options, "--wandb-project", "mirip-ranking"]) == 0
    assert started == ["mirip-ranking"]
    assert run(["train", *options, "--wandb-run-name", "x", "--report-to", "none"]) == 0
    assert len(started) == 1
