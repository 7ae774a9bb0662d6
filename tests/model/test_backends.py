from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import get_args

import pytest

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import Backend, ComputeSection, ModelSection
from bigtfm.model import backends
from bigtfm.model.backends import (
    Choice,
    Device,
    Needs,
    choose,
    choose_kernels,
    has_liger,
    installed_kernels,
    needs_of,
    obstacle,
)

CPU = Device("CPU", None)
V100, T4 = Device("V100", (7, 0)), Device("T4", (7, 5))
A100, L40, H100 = Device("A100", (8, 0)), Device("L40S", (8, 9)), Device("H100", (9, 0))
B200, RTX5090 = Device("B200", (10, 0)), Device("RTX 5090", (12, 0))
ALL = {"flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen"}
BF16 = Needs("bf16", 128)


def test_the_run_config_names_the_same_backends():
    assert set(get_args(ComputeSection.model_fields["attention"].annotation)) == {"auto", *get_args(Backend)}


@pytest.mark.parametrize(
    ("device", "needs", "installed", "expected"),
    [
        (CPU, Needs("fp32", 32), ALL, "sdpa"),
        (CPU, BF16, ALL, "sdpa"),
        (V100, Needs("fp16", 64), ALL, "sdpa"),
        (T4, Needs("bf16", 64), ALL, "sdpa"),
        (A100, BF16, ALL, "flash_attn_2"),
        (A100, BF16, {"varlen"}, "varlen"),
        (A100, BF16, (), "sdpa"),
        (L40, BF16, ALL, "flash_attn_2"),
        (H100, BF16, ALL, "flash_attn_3"),
        (H100, BF16, ALL - {"flash_attn_3"}, "flash_attn_4"),
        (H100, BF16, {"flash_attn_2", "varlen"}, "flash_attn_2"),
        (H100, BF16, {"varlen"}, "varlen"),
        (B200, BF16, ALL, "flash_attn_4"),
        (B200, BF16, {"flash_attn_3"}, "sdpa"),
        (RTX5090, BF16, ALL, "flash_attn_2"),
        (H100, Needs("fp32", 128), ALL, "sdpa"),
        (H100, Needs("fp16", 128), ALL, "flash_attn_3"),
        (H100, Needs("bf16", 128, window=True), ALL, "flash_attn_3"),
        (H100, Needs("bf16", 64, bias=True), ALL, "sdpa"),
        (H100, Needs("bf16", 64, dropout=True), ALL, "reference"),
        (CPU, Needs("fp32", 64, bias=True, dropout=True), (), "reference"),
        (H100, Needs("bf16", 60), ALL, "flash_attn_2"),  # no multiple of 8
        (H100, Needs("bf16", 60), {"varlen"}, "sdpa"),
        (B200, Needs("bf16", 192), ALL, "flash_attn_2"),
        (B200, Needs("bf16", 256), ALL, "flash_attn_4"),
        (H100, Needs("bf16", 512), ALL, "sdpa"),
    ],
)
def test_auto(device, needs, installed, expected):
    assert choose("auto", device=device, needs=needs, installed=installed).name == expected


# Each rule alone: (backend, where it works, where it doesn't, what is said).
RULES = [
    ("flash_attn_2", (A100, BF16), (T4, BF16), "Ampere"),
    ("varlen", (A100, BF16), (V100, Needs("fp16", 64)), "Ampere"),
    ("flex", (A100, BF16), (T4, Needs("fp16", 64)), "Ampere"),
    ("sdpa_flash", (A100, BF16), (T4, Needs("fp16", 64)), "Ampere"),
    ("sdpa_cudnn", (A100, BF16), (T4, Needs("fp16", 64)), "Ampere"),
    ("sdpa_efficient", (T4, Needs("fp16", 64)), (T4, Needs("bf16", 64)), "Ampere"),
    ("sdpa_efficient", (V100, Needs("fp32", 64)), (CPU, Needs("fp32", 64)), "NVIDIA GPU"),
    ("flash_attn_3", (H100, BF16), (A100, BF16), "Hopper GPU"),
    ("flash_attn_3", (H100, BF16), (B200, BF16), "Hopper GPU"),
    ("flash_attn_4", (B200, BF16), (A100, BF16), "Blackwell"),
    ("flash_attn_4", (H100, BF16), (RTX5090, BF16), "Blackwell"),
    *[
        (name, (H100, BF16), (H100, Needs("fp32", 128)), "bf16 or fp16 alone")
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "sdpa_flash", "sdpa_cudnn")
    ],
    *[
        (name, (H100, BF16), (H100, Needs("bf16", 128, bias=True)), "no relative bias")
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "sdpa_flash", "sdpa_cudnn")
    ],
    *[
        (name, (H100, BF16), (CPU, BF16), "NVIDIA GPU")
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "sdpa_cudnn")
    ],
    ("flex", (H100, Needs("fp32", 64)), (CPU, Needs("fp32", 64)), "no gradients on a CPU"),
    ("flex", (H100, Needs("bf16", 16, bias=True, window=True)), (H100, Needs("bf16", 8)), "16 or more"),
    ("sdpa_flash", (A100, Needs("bf16", 64)), (A100, Needs("bf16", 64, window=True)), "no window"),
    ("sdpa_cudnn", (A100, Needs("bf16", 64)), (A100, Needs("bf16", 64, window=True)), "no window"),
    ("sdpa_flash", (CPU, Needs("fp32", 64, window=True)), (CPU, Needs("fp32", 64, bias=True)), "no gradient"),
    ("flash_attn_2", (H100, Needs("bf16", 250)), (H100, Needs("bf16", 257)), "up to 256"),
    ("flash_attn_3", (H100, Needs("bf16", 256)), (H100, Needs("bf16", 250)), "multiple of 8"),
    ("flash_attn_3", (H100, Needs("bf16", 256)), (H100, Needs("bf16", 264)), "up to 256"),
    ("flash_attn_4", (H100, Needs("bf16", 192)), (H100, Needs("bf16", 250)), "multiple of 8"),
    ("flash_attn_4", (B200, Needs("bf16", 256)), (B200, Needs("bf16", 192)), "up to 128, and 256"),
    ("varlen", (H100, Needs("bf16", 256)), (H100, Needs("bf16", 20)), "multiple of 8"),
    ("varlen", (H100, Needs("bf16", 256)), (H100, Needs("bf16", 320)), "up to 256"),
    ("sdpa_flash", (H100, Needs("bf16", 20)), (H100, Needs("bf16", 320)), "up to 256"),
    ("sdpa_cudnn", (H100, Needs("bf16", 128)), (H100, Needs("bf16", 136)), "up to 128"),
    ("sdpa_cudnn", (H100, Needs("bf16", 128)), (H100, Needs("bf16", 20)), "multiple of 8"),
    ("sdpa_efficient", (H100, Needs("bf16", 512, bias=True)), (H100, Needs("bf16", 20)), "multiple of 8"),
    ("sdpa_efficient", (H100, Needs("fp32", 20)), (H100, Needs("fp32", 30)), "multiple of 4"),
    *[
        (name, (H100, Needs("bf16", 64)), (H100, Needs("bf16", 64, dropout=True)), "only reference")
        for name in get_args(Backend)
        if name != "reference"
    ],
]


@pytest.mark.parametrize(("backend", "works", "fails", "said"), RULES)
def test_each_rule(backend, works, fails, said):
    assert obstacle(backend, *works, ALL) is None
    assert said in obstacle(backend, *fails, ALL)
    assert choose(backend, device=works[0], needs=works[1], installed=ALL).name == backend
    with pytest.raises(ConfigProblem) as caught:
        choose(backend, device=fails[0], needs=fails[1], installed=ALL)
    assert caught.value.where == "run config: compute.attention"
    assert said in caught.value.what
    named = caught.value.fix.split()[3]
    assert choose(named, device=fails[0], needs=fails[1], installed=ALL).name == named  # the fix is one


@pytest.mark.parametrize("backend", sorted(ALL))
def test_a_package_that_is_missing(backend):
    device = B200 if backend == "flash_attn_4" else H100
    with pytest.raises(ConfigProblem, match="it is not installed") as caught:
        choose(backend, device=device, needs=BF16, installed=ALL - {backend})
    assert "install" in caught.value.fix or "build" in caught.value.fix


@pytest.mark.parametrize("device", [CPU, V100, A100, H100, B200])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_math", "reference"])
def test_what_works_everywhere(backend, device):
    for needs in (Needs("fp32", 7, window=True, bias=True), Needs("fp16", 300), BF16):
        assert choose(backend, device=device, needs=needs, installed=()).name == backend


def test_the_reason_is_for_a_reader():
    needs = Needs("bf16", 128)
    assert choose("auto", device=H100, needs=needs, installed=ALL) == Choice(
        "flash_attn_3", "flash_attn_3: H100 (SM90), bf16, head size 128"
    )
    needs = Needs("fp32", 64, window=True, bias=True, dropout=True)
    reason = choose("auto", device=CPU, needs=needs, installed=()).reason
    assert reason.startswith("reference: CPU, fp32, head size 64, window, relative bias, attention dropout; ")
    assert reason.endswith("model.attention_dropout 0 allows faster ones")


def test_needs_of_a_model():
    assert needs_of(ModelSection(), "fp32") == Needs("fp32", 32)
    model = ModelSection(positions="relative", window=16, attention_dropout=0.1, head_dim=64)
    assert needs_of(model, "bf16") == Needs("bf16", 64, window=True, bias=True, dropout=True)


# --- what is there ---


def found(monkeypatch, tmp_path, files, distributions=()):
    """installed_kernels() in a world of these files (path: text) and distributions."""
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def find_spec(name):
        folder, module = tmp_path / name, tmp_path / f"{name}.py"
        if folder.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return ModuleSpec(name, None) if module.exists() else None

    monkeypatch.setattr(backends.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        backends.importlib.metadata, "distributions", lambda name: [name] * (name in distributions)
    )
    return installed_kernels()


@pytest.mark.parametrize(
    ("files", "distributions", "expected"),
    [
        ({}, (), set()),
        ({"flash_attn/flash_attn_interface.py": ""}, (), {"flash_attn_2"}),
        # flash-attn 2.8.3 carries an early folder `cute` that trains nothing
        ({"flash_attn/flash_attn_interface.py": "", "flash_attn/cute/a.py": ""}, (), {"flash_attn_2"}),
        ({"flash_attn/cute/interface.py": ""}, ("flash-attn-4",), {"flash_attn_4"}),
        ({"flash_attn_interface.py": ""}, (), {"flash_attn_3"}),
        ({"torch/nn/attention/varlen.py": "def varlen_attn(is_causal)"}, (), set()),  # torch 2.10
        ({"torch/nn/attention/varlen.py": "def varlen_attn(window_size)"}, (), {"varlen"}),
    ],
)
def test_installed_kernels(monkeypatch, tmp_path, files, distributions, expected):
    assert found(monkeypatch, tmp_path, files, distributions) == expected


@pytest.mark.parametrize("driver", [True, False])
def test_this_device(monkeypatch, driver):
    """Without a driver torch is not asked."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        get_device_capability=lambda: (9, 0),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(backends.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(backends.Path, "exists", lambda _: False)
    expected = "H100 80GB HBM3 (SM90)" if driver else "CPU"
    assert str(backends.this_device()) == expected


def test_choosing_imports_no_torch():
    code = (
        "import sys; from bigtfm.model import backends as b; b.installed_kernels(); "
        "b.choose('auto', device=b.Device('CPU', None), needs=b.Needs('fp32', 64), installed=()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LLAMA = ModelSection()
GPT2 = ModelSection(norm="layernorm", activation="gelu_tanh", positions="learned")


@pytest.mark.parametrize(
    ("compute", "model", "device", "installed", "expected"),
    [
        ({}, LLAMA, H100, True, "liger"),
        ({}, LLAMA, H100, False, "torch"),
        ({}, LLAMA, CPU, True, "torch"),
        ({}, LLAMA, T4, True, "torch"),
        ({}, GPT2, H100, True, "torch"),
        ({"compile_blocks": True}, LLAMA, H100, True, "torch"),
        ({"kernels": "torch"}, LLAMA, H100, True, "torch"),
        ({"kernels": "liger"}, LLAMA, A100, True, "liger"),
        ({"kernels": "liger"}, ModelSection(norm="layernorm", activation="gelu"), A100, True, "liger"),
    ],
)
def test_whose_kernels(compute, model, device, installed, expected):
    chosen = choose_kernels(ComputeSection(**compute), model=model, device=device, installed=installed)
    assert chosen == expected


@pytest.mark.parametrize(
    ("model", "device", "installed", "said", "fix"),
    [
        (LLAMA, CPU, True, "an Ampere GPU or later (SM80), and this is CPU", "set compute.kernels to auto"),
        (GPT2, H100, True, "no RMSNorm, SwiGLU or rotary positions", "set compute.kernels to auto"),
        (LLAMA, H100, False, "is not installed", "or pip install 'bigtfm[liger]'"),
    ],
)
def test_liger_where_it_can_not_serve(model, device, installed, said, fix):
    with pytest.raises(ConfigProblem) as caught:
        choose_kernels(ComputeSection(kernels="liger"), model=model, device=device, installed=installed)
    assert said in caught.value.what
    assert fix in caught.value.fix


def test_an_old_liger_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert not has_liger()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops/swiglu.py"
    file.write_text("class LigerSiLUMulFunction: ...")
    assert not has_liger()
    file.write_text("class LigerFusedGateUpSiLUMulFunction: ...")
    assert has_liger()
