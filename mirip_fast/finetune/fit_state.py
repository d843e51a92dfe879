"""The checkpoints of the end-to-end loop: what is in one, and how to go on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mirip_fast.errors import CheckpointError
from mirip_fast.finetune.fit_parts import Progress
from mirip_fast.finetune.lora import merged_state

if TYPE_CHECKING:
    from mirip_fast.finetune.fit import FullFit


def checkpoint_of(fit: FullFit, *, resumable: bool = True) -> dict[str, Any]:
    """The documented checkpoint: the weights as judged (adapters merged), and what resuming needs.

    Args:
        fit: the loop.
        resumable: leave out the optimizer and what else only resuming needs, if False.
    """
    state = {
        "epoch": fit.epoch,
        "model_state_dict": _deployed(fit),
        "optimizer_state_dict": fit.optimizer.state_dict() if resumable else {},
        "scheduler_state_dict": fit.scheduler.state_dict() if resumable else {},
        "best_accuracy": fit.stopping.best,
        "config": fit.config.to_dict(),
        "model": fit.model_info,
    }
    if resumable:
        state["training_state"] = {
            "early_stopping": fit.stopping.state_dict(),
            "plan": vars(fit.plan),
            "learning": {name: p.detach() for name, p in fit.learning.items()},
            "scaler": fit.scaler.state_dict(),
            "ema": fit.ema.state_dict() if fit.ema else None,
            "swa": fit.swa.state_dict() if fit.swa else None,
            "parts_per_step": fit.parts_per_step,
            "judged_at_once": fit.judged_at_once,
            "progress": vars(fit.now),
        }
    return state


def _deployed(fit: FullFit) -> dict[str, torch.Tensor]:
    """Projector, score head and backbone under their plain names, as they are judged."""
    with fit.shown():
        state = dict(fit.model.head.state_dict())
        backbone = merged_state(fit.model.backbone)
        state.update({f"backbone.{name}": value for name, value in backbone.items()})
        if fit.average() is not None:
            state = {name: value.clone() for name, value in state.items()}
    return state


def resume_fit(fit: FullFit, checkpoint: dict[str, Any]) -> None:
    """Go on where ``checkpoint`` was made, in the midst of an epoch too.

    Raises:
        CheckpointError: it is of another model, or not for resuming.
    """
    try:
        state = checkpoint["training_state"]
        learning = state["learning"]
        with torch.no_grad():
            for name, parameter in fit.learning.items():
                parameter.copy_(learning[name])
        fit.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        fit.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        fit.stopping.load_state_dict(state["early_stopping"])
        fit.scaler.load_state_dict(state["scaler"])
        for average, kept in ((fit.ema, state["ema"]), (fit.swa, state["swa"])):
            if average is not None:
                average.load_state_dict(kept)
        fit.parts_per_step = int(state["parts_per_step"])
        fit.judged_at_once = int(
            state.get("judged_at_once", fit.judged_at_once)
        )  # older ones do not say
        fit.now = Progress(**state["progress"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
    fit.epoch = int(checkpoint["epoch"])
