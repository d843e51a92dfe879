"""What one process of a distributed step does; see test_finetune_distributed."""

from __future__ import annotations

from pathlib import Path

import torch
from finetune_models import pictures, prepared

from mirip_fast.config import Config
from mirip_fast.finetune.distributed import join_processes
from mirip_fast.finetune.step import take_gradients
from mirip_fast.finetune.strategy import unfreeze
from mirip_fast.models.losses import PairLoss

#: Images per step: some do not divide by 2 or 3, and one gives a process nothing to do.
BATCHES = (11, 12, 2)


def main(folder: Path, out: Path) -> None:
    model, strategy = prepared(folder, Config())
    model = model.double()
    unfreeze(model, strategy, -1)
    model.train()
    loss_of = PairLoss(kind="logistic")
    found = []
    with join_processes("cpu") as (group, _):
        for n in BATCHES:
            images, tiers = pictures(n)
            labels = torch.from_numpy(tiers)
            mine = images[group.share(n)]
            parts = [lambda chunk=chunk: model(chunk) for chunk in mine.split(2) if len(chunk)]
            loss, scores = take_gradients(
                parts, n, lambda s, labels=labels: loss_of(s, labels),
                [p for _, p in model.trainable()], group=group,
            )  # fmt: skip
            gradients = {}
            for name, parameter in model.trainable():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad
                parameter.grad = None
            found.append({"loss": loss, "scores": scores, "gradients": gradients})
        torch.save(found, out / f"{group.world}-{group.rank}.pt")
