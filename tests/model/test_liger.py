"""Liger Kernel's kernels are our layers: on a GPU, or on a CPU by Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/model/test_liger.py
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import numpy as np
import pytest
import torch
from small_models import assert_same, batch, gradients, make

from bigtfm.model import layers, liger

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
if importlib.util.find_spec("liger_kernel") is None:
    pytest.skip("needs Liger Kernel", allow_module_level=True)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """What Triton's interpreter (3.6, 3.9) lacks: floats as tensors, and the GPU library's rsqrt."""
    if ON_GPU:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert, tl = interpreter._implicit_cvt, interpreter.tl

    def with_floats(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: tl.rsqrt(x))


def random(*shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_()


def assert_equal_with_gradients(ours, theirs, inputs, dtype):
    """Both functions of the inputs, and their gradients under the same random gradient of the result."""
    results = []
    for function in (ours, theirs):
        out = function(*inputs)
        parts = out if isinstance(out, tuple) else (out,)
        total = sum((part.float() * torch.ones_like(part).cumsum(0)).sum() for part in parts)
        results.append((*(part.detach() for part in parts), *torch.autograd.grad(total, inputs)))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


# The interpreter multiplies the bits of bf16 as whole numbers.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if ON_GPU else torch.float16])


@DTYPES
def test_rms_norm(dtype):
    inputs = (random(7, 24, dtype=dtype), random(24, dtype=dtype))
    ours, theirs = (lambda x, w, by=by: by(x, w, 1e-5) for by in (layers.rms_norm, liger.rms_norm))
    assert_equal_with_gradients(ours, theirs, inputs, dtype)


@DTYPES
def test_swiglu(dtype):
    ours = lambda x: layers.gate(x, layers.ACTIVATIONS["swiglu"])  # noqa: E731
    assert_equal_with_gradients(ours, liger.swiglu, (random(7, 24, dtype=dtype),), dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 9])
def test_rotary_positions_and_what_they_are_given_stays(dtype, tokens):
    cos, sin = layers.rotary_angles(torch.arange(tokens, device=DEVICE) * 3, 12, 10000.0)
    qk = random(tokens, 6, 12, dtype=dtype)
    before = qk.detach().clone()
    ours, theirs = (lambda x, by=by: by(x, 4, cos, sin) for by in (layers.rotated, liger.rotated))
    assert_equal_with_gradients(ours, theirs, (qk,), dtype)
    assert torch.equal(qk, before)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", ["gpt", "gpt-window", "modern-bert", "t5"])
def test_a_model(kind, recompute):
    shape = {"activation": "geglu_tanh"} if kind == "t5" else {}
    ours, theirs = (make(kind, recompute=recompute, **shape).to(DEVICE) for _ in range(2))
    liger.use_liger(theirs)
    inputs = {
        name: value.to(DEVICE) if torch.is_tensor(value) else value
        for name, value in batch(ours, [5, 1, 9, 24]).items()
    }
    assert_same(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-4, rtol=1e-4)


def test_what_it_takes_over():
    model = make("gpt")
    liger.use_liger(model)
    block = model.decoder.layers[0]
    assert block.mlp_norm.kernel is liger.rms_norm
    assert model.decoder.norm.kernel is liger.rms_norm
    assert block.mlp.activate is liger.swiglu
    assert block.attention.rotated is liger.rotated
    geglu = make("modern-bert")
    liger.use_liger(geglu)
    assert geglu.encoder.layers[0].mlp.activate is not liger.swiglu
