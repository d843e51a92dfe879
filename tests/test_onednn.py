"""Linear layers through oneDNN: the same numbers, and the model as it was afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_embed import Phase, draw
from torch import nn

from mirip_fast.features import forward, onednn, tiny_random
from mirip_fast.features.onednn import through_onednn

needs_onednn = pytest.mark.skipif(not onednn._available(), reason="no oneDNN for this processor")


def changed(model: nn.Module) -> list[nn.Module]:
    """The layers that compute otherwise than their class says."""
    return [module for module in model.modules() if "forward" in vars(module)]


@needs_onednn
@pytest.mark.parametrize("width", [(1, 1), (7, 3), (192, 768), (1024, 64)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_agrees_with_the_formula(width: tuple[int, int], bias: bool) -> None:
    layer = nn.Linear(*width, bias=bias)
    wide = torch.randn(3, 10, 2 * width[0])
    cases = {
        "tokens": wide[..., : width[0]].contiguous(),
        "one row": wide[0, 0, : width[0]].contiguous(),
        "every other number": wide[..., ::2],
        "first tokens": wide[..., : width[0]][:, 0],
        "transposed": torch.randn(3, width[0], 10).transpose(1, 2),
        "nothing": wide[:0, :, : width[0]],
    }
    before = layer(cases["tokens"])
    with through_onednn(layer):
        assert changed(layer) == [layer]
        for name, rows in cases.items():
            wanted = rows.double().numpy() @ layer.weight.double().numpy().T
            if bias:
                wanted = wanted + layer.bias.double().numpy()
            got = layer(rows).numpy()
            assert got.dtype == np.float32, name
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
        torch.testing.assert_close(layer(cases["tokens"]), before, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_whole_model_gives_the_same_tokens_and_learns_again_afterwards() -> None:
    model = tiny_random.build().eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        before = model(pixels).last_hidden_state
        with through_onednn(model):
            assert len(changed(model)) == sum(type(m) is nn.Linear for m in model.modules()) > 0
            during = model(pixels).last_hidden_state
    assert not changed(model)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
    assert model(pixels).last_hidden_state.requires_grad


@needs_onednn
def test_leaves_alone_what_it_would_get_wrong() -> None:
    gaps = nn.Linear(4, 8)
    gaps.bias = nn.Parameter(torch.randn(16)[::2])
    double, half = nn.Linear(4, 8).double(), nn.Linear(4, 8).bfloat16()
    special = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 8)
    model = nn.ModuleList([gaps, double, half, special, nn.LayerNorm(4)])
    with through_onednn(model):
        assert not changed(model)
    patched = nn.Linear(4, 8)
    own = patched.forward = lambda rows: rows + 1
    with through_onednn(patched):
        assert patched.forward is own
    assert patched.forward is own


@needs_onednn
def test_what_the_kernel_does_not_know_goes_the_usual_way() -> None:
    layer = nn.Linear(4, 8)
    rows = torch.randn(3, 4)
    with through_onednn(layer):
        layer(rows).sum().backward()
        assert layer.weight.grad is not None
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert layer(rows.bfloat16()).dtype == torch.bfloat16


@needs_onednn
@torch.inference_mode()
def test_a_copy_made_meanwhile_has_weights_of_its_own() -> None:
    layer = nn.Linear(4, 8)
    with through_onednn(layer):
        twin = copy.deepcopy(layer)
        with through_onednn(layer):  # once is enough
            pass
        assert changed(layer)
    twin.weight.zero_()
    assert torch.equal(twin(torch.randn(3, 4)), twin.bias.expand(3, 8))


def test_other_machines_keep_torchs_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 8)
    monkeypatch.setattr(onednn.platform, "machine", lambda: "arm64")
    with through_onednn(layer):
        assert not changed(layer)
    monkeypatch.setattr(onednn.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn, "_KERNEL", "_there_is_no_such_kernel")
    with through_onednn(layer):
        assert not changed(layer)


@needs_onednn
@pytest.mark.parametrize("compiled", [False, True])
def test_embed_uses_it_while_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Compiled code has kernels of its own choice."""
    phase, during, models = Phase(tmp_path), [], []
    load = phase.load
    compute = forward.Forward._compute

    def loaded() -> object:
        backbone = load()
        backbone.compiled = compiled
        models.append(backbone.model)
        return backbone

    def watched(self: forward.Forward, batch: forward.Batch) -> forward.Computed:
        during.append(len(changed(self.backbone.model)))
        return compute(self, batch)

    monkeypatch.setattr(phase, "load", loaded)
    monkeypatch.setattr(forward.Forward, "_compute", watched)
    phase.run([draw(tmp_path / "a.png", 1)])
    assert during and all(bool(count) is not compiled for count in during)
    assert not changed(models[0])
