"""A head trained in a stack is the head trained alone, in double precision and against plain loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fit import rows, run_in, settings, weights
from torch import Tensor, nn

from mirip_fast.config import HeadConfig
from mirip_fast.models import stacked_loss
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss
from mirip_fast.models.stacked_head import StackedHeads
from mirip_fast.models.stacked_loss import stacked_pair_loss
from mirip_fast.ranking import many_heads
from mirip_fast.ranking.batches import epoch_generator, image_batches
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.head_tasks import HeadTask, TrainedHead
from mirip_fast.ranking.many_heads import ManyHeads, stackable, train_heads
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import set_seed
from mirip_fast.training.presets import Preset
from mirip_fast.training.trackers import Trackers

CPU = torch.device("cpu")
NARROW = HeadConfig(projector_hidden_dim=12, projector_output_dim=8, score_hidden_dim=6)
# No pair notices it: its gradient is rounding alone, which AdamW blows up to steps of full size.
SHIFT = "score_head.layers.3.bias"
NOTHING = np.empty(0, np.int64)


def heads(count: int, attention: tuple[int, int] | None = None) -> list[RankingHead]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        head = RankingHead(5, NARROW, attention).double()
        for parameter in head.parameters():  # norms and biases that are not 1 and 0
            parameter.data += 0.3 * torch.randn_like(parameter)
        made.append(head)
    return made


def task(
    train: np.ndarray, val: np.ndarray = NOTHING, *, preset: Preset | None = None, **train_options: object
) -> HeadTask:  # fmt: skip
    config = settings(**train_options)
    config.head.projector_dropout = 0.0
    return HeadTask(train, val, config, preset or Preset(16, 3e-3, 5))


def subset(data: Rows, index: np.ndarray) -> Rows:
    return Rows(
        [data.ids[i] for i in index], data.features[index], data.tiers[index], [None] * len(index),
        None if data.within is None else data.within[index],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("training", "attention", "width"),
    [(False, None, 5), (True, None, 5), (True, (4, 1), 24)],
    ids=["scoring", "training", "attention"],
)
def test_stacked_layers_are_the_layers_of_each_head(
    training: bool, attention: tuple[int, int] | None, width: int
) -> None:
    alone = heads(3, attention)
    stack = StackedHeads([head.state_dict() for head in alone], [0.1, 0.5, 0.0])
    features = torch.randn(3, 7, width, dtype=torch.float64)
    counts = [7, 4, 5] if training else [7, 7, 7]
    noise = [torch.Generator().manual_seed(i) for i in range(3)] if training else []
    scores = stack(features, noise, counts)
    scores.pow(2)[torch.arange(7) < torch.tensor(counts)[:, None]].sum().backward()
    for i, head in enumerate(alone):
        head.train(training)
        for layer in head.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = stack.dropout[i]
        torch.manual_seed(i)
        expected = head(features[i, : counts[i]])
        torch.testing.assert_close(scores[i, : counts[i]], expected, rtol=1e-12, atol=1e-12)
        expected.pow(2).sum().backward()
        for name, parameter in head.named_parameters():
            gradient = stack.weights[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[i], parameter.grad, rtol=1e-10, atol=1e-12)


LOSSES = [
    PairLoss(),
    PairLoss(margin=0.3, tier_weights=((0, 2, 1, 0), (0, 0, 0.5, 1), (0, 0, 0, 3), (0, 0, 0, 0))),
    PairLoss("logistic", label_smoothing=0.2),
    PairLoss(within_share=1),
    PairLoss("logistic", within_share=0.3),
    PairLoss(within_share=0),
    PairLoss(label="tier_score", min_gap=0.4),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("table", [1 << 21, 0])
def test_stacked_losses_are_the_losses_of_each_batch(
    loss: PairLoss, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked_loss, "_TABLE", table)
    counts = torch.tensor([9, 1, 6, 9, 0])
    quarters = (
        4 * torch.randn(5, 9, dtype=torch.float64)
    ).round() / 4  # ties, and exactly on the hinge
    scores = quarters.requires_grad_()
    labels = torch.randint(4, (5, 9))
    labels[3] = 2  # one tier: no pair
    if loss.label == "tier_score":
        labels = labels + torch.rand(5, 9)
    within = torch.randint(3, (5, 9))
    losses = stacked_pair_loss(loss, scores, labels, within, counts)
    losses.sum().backward()
    assert scores.grad is not None
    for i, n in enumerate(counts.tolist()):
        mine = scores.detach()[i, :n].clone().requires_grad_()
        expected = loss(mine, labels[i, :n], within[i, :n])
        expected.backward()
        torch.testing.assert_close(losses[i], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scores.grad[i, :n], mine.grad, rtol=1e-12, atol=1e-14)
        assert not scores.grad[i, n:].any()


def test_an_image_that_is_there_twice_counts_twice() -> None:
    scores = torch.randn(6, dtype=torch.float64)
    tiers = torch.tensor([0, 1, 1, 2, 3, 0])
    times = [2, 1, 3, 0, 1, 1]
    index = torch.tensor([i for i, count in enumerate(times) for _ in range(count)])
    found = stacked_pair_loss(
        PairLoss(), scores[index][None], tiers[index][None], None, torch.tensor([len(index)])
    )
    terms = weight = 0.0
    for i in range(6):
        for j in range(6):
            if tiers[i] < tiers[j]:
                terms += times[i] * times[j] * max(0.0, 1 - float(scores[i] - scores[j]))
                weight += times[i] * times[j]
    assert float(found[0]) == pytest.approx(terms / weight, rel=1e-12)


def train_alone(data: Rows, of: HeadTask) -> dict[str, Tensor]:
    """The same training written out for one head, in double precision."""
    options, preset = of.config.train, of.preset
    set_seed(options.seed)
    head = RankingHead(data.input_dim, of.config.head).double()
    matrices = [p for p in head.parameters() if p.dim() == 2]
    vectors = [p for p in head.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=preset.learning_rate, betas=(options.beta1, options.beta2), eps=options.eps,
    )  # fmt: skip
    features, tiers = torch.from_numpy(data.features[:, 0]).double(), torch.from_numpy(data.tiers)
    loss = PairLoss(options.loss, options.margin)
    total = preset.epochs * max(1, math.ceil(len(of.train) / preset.batch_size))
    step = 0
    floor = options.scheduler_eta_min / preset.learning_rate
    for epoch in range(1, preset.epochs + 1):
        rng = epoch_generator(options.seed, epoch)
        for batch in image_batches(len(of.train), preset.batch_size, rng):
            index = torch.from_numpy(of.train[batch])
            optimizer.zero_grad()
            loss(head(features[index]), tiers[index]).backward()
            nn.utils.clip_grad_norm_(head.parameters(), options.gradient_clip_norm)
            rate = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = preset.learning_rate * rate
            optimizer.step()
            step += 1
    return head.state_dict()


def test_a_stack_trains_what_plain_loops_train_in_double_precision() -> None:
    data = rows(60, noise=2)
    rng = np.random.default_rng(0)
    tasks = [
        task(np.arange(50), seed=1),
        task(np.arange(50), seed=2),  # the same recipe: one optimizer steps both
        task(rng.integers(60, size=50), seed=3, loss="logistic"),
        task(rng.integers(60, size=33), seed=4, weight_decay=0.5),  # fewer steps in an epoch
        task(np.arange(20), seed=5, preset=Preset(16, 1e-2, 3)),  # ends earlier
        task(np.arange(60), seed=6, gradient_clip_norm=0.05, margin=0.2, beta1=0.8),
    ]
    trained = ManyHeads(data, tasks, CPU, torch.float64).run()
    for of, head in zip(tasks, trained, strict=True):
        assert (head.epochs, head.best_epoch, head.finite) == (
            of.preset.epochs,
            of.preset.epochs,
            True,
        )
        expected = train_alone(data, of)
        del expected[SHIFT]
        for name, value in expected.items():
            # The arrays are kept in single precision; training was in double.
            np.testing.assert_allclose(head.arrays[name], value.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_a_stack_trains_what_head_fit_trains(tmp_path: Path, within: bool, views: int) -> None:
    data = rows(80, noise=2.5, views=views, within=within)
    tasks = []
    for seed, (rate, dropout, patience) in enumerate(
        [(3e-3, 0.1, 3), (1e-2, 0.0, 2), (3e-3, 0.3, 0), (3e-3, 0.1, 4)]
    ):
        order = np.random.default_rng(seed).permutation(80)
        # A large eps keeps AdamW from blowing rounding up.
        config = settings(seed=seed, early_stopping_patience=patience, eps=1e-3)
        config.head.projector_dropout = dropout
        tasks.append(HeadTask(order[: 40 + 4 * seed], order[60:], config, Preset(16, rate, 9)))
    stopped = []
    for place, (of, head) in enumerate(zip(tasks, ManyHeads(data, tasks, CPU).run(), strict=True)):
        run = run_in(tmp_path / str(place))
        alone = HeadFit(
            subset(data, of.train),
            subset(data, of.val),
            copy.deepcopy(of.config),
            of.preset,
            {},
            CPU,
        ).run(run, Trackers({}))
        found = (head.epochs, head.best_epoch, head.accuracy)
        assert found == (alone.epochs, alone.best_epoch, alone.best_accuracy)
        stopped.append(alone.stopped_early)
        for name, value in weights(run.best).items():
            if name != SHIFT:
                np.testing.assert_allclose(head.arrays[name], value, rtol=1e-4, atol=1e-5)
    assert len(set(stopped)) == 2, "some heads are to leave the stack before others"


def equal(first: TrainedHead, second: TrainedHead) -> bool:
    return all(
        np.allclose(first.arrays[name], second.arrays[name], rtol=1e-5, atol=1e-6)
        for name in first.arrays
        if name != SHIFT
    )


@pytest.mark.parametrize("size", [1, 2])
def test_a_head_does_not_depend_on_its_stack(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(60, noise=2)
    options = {"early_stopping_patience": 2, "eps": 1e-3}
    preset = Preset(16, 3e-3, 12)
    order = [np.random.default_rng(seed).permutation(60) for seed in range(6)]
    tasks = [task(o[:40], o[40:], preset=preset, seed=i, **options) for i, o in enumerate(order)]
    together = train_heads(data, tasks, CPU)
    # One recipe, one optimizer for all: those that go on have to keep their own place in it.
    assert len({head.epochs for head in together}) > 2
    assert together[0].epochs < max(head.epochs for head in together)
    monkeypatch.setattr(many_heads, "heads_per_stack", lambda *_: size)
    assert all(map(equal, together, train_heads(data, tasks, CPU)))


def test_a_loss_that_is_not_finite_is_one_heads_own() -> None:
    data = rows(60, noise=2)
    wild = Preset(16, 1e30, 5)
    tasks = [task(np.arange(50)), task(np.arange(50), preset=wild), task(np.arange(50), seed=7)]
    good, bad, other = ManyHeads(data, tasks, CPU).run()
    assert (good.finite, bad.finite, other.finite) == (True, False, True)
    assert equal(good, ManyHeads(data, tasks[:1], CPU).run()[0])


def test_what_a_stack_can_not_train_is_known() -> None:
    assert stackable(settings())
    for option in ({"pairs": "sampled"}, {"ema_decay": 0.9}, {"swa_start": 2},
                   {"gradient_accumulation_steps": 2}):  # fmt: skip
        assert not stackable(settings(**option))
