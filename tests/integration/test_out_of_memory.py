"""Memory that runs out under a limit of the system: what is said, and a smaller micro batch."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY, losses

from bigtfm.resilience import events, out_of_memory

Json = Callable[..., Path]
MIB = 2**20


def little_memory() -> None:
    """`bigtfm` that gets 80 MiB more than it has when the first forward pass begins."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    forward = DeepSpeedEngine.forward

    def limited(engine: object, *args: object, **kwargs: object) -> object:
        DeepSpeedEngine.forward = forward
        [used] = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(used) + 80 * MIB, resource.RLIM_INFINITY))
        return forward(engine, *args, **kwargs)

    DeepSpeedEngine.forward = limited
    rank_runner._bigtfm()


@pytest.mark.launcher
@pytest.mark.slow
def test_a_smaller_micro_batch_is_asked_for_or_taken(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """256 windows at once don't fit. A line says so; or, with guard.halve_micro_batch, the run goes on."""
    batch = {"train_batch_size": 512, "train_micro_batch_size_per_gpu": 256}
    zero = {
        "stage": 2,
        "reduce_bucket_size": 10**6,
    }  # by default DeepSpeed takes 2 GB for it at the first step
    json_file = deepspeed_json(**batch, zero_optimization=zero)
    fixed = [f"data.path={tiny_data}", f"run.dir={tmp_path}", *TINY, "steps=3"]
    args = ["train", "--deepspeed_config", str(json_file), *fixed]
    told = rank_runner.finish(
        rank_runner.start([*args, "run.name=told"], tmp_path, 1, program=little_memory), tmp_path
    )
    assert told.code == 64, told.output[-2000:]
    line = next(line for line in told.output.splitlines() if line.startswith("bigtfm: error"))
    assert re.fullmatch(
        r"bigtfm: error: rank 0, step 1: out of memory with micro batch 256 of 32 tokens \(planned: [\d.]+ "
        r"MiB in the loss: [\d.]+ MiB activations, 17.1 MiB logits\): .*can't allocate memory.*\. Fix: use "
        r"micro batch 128 and accumulation 4 in the DeepSpeed JSON, which give the same loss "
        r"\(guard.halve_micro_batch=true does so by itself\), or compute.recompute=full, or more ranks",
        line,
    ), line

    run_dir, halve = tmp_path / "halved", [*args, "run.name=halved", "guard.halve_micro_batch=true"]
    finished = rank_runner.finish(rank_runner.start(halve, tmp_path, 2, program=little_memory), tmp_path)
    assert finished.codes == [0, 0], finished.output[-2000:]
    happened = [row["event"] for row in events.read(run_dir)]
    assert {"out of memory", "restart"} <= set(happened)
    size = json.loads((run_dir / "resolved.json").read_text())["micro_batch"]
    assert size < 256
    assert json.loads((run_dir / out_of_memory.REMEMBERED).read_text()) == {
        "stated": 256,
        "micro_batch": size,
    }
    whole = rank_runner.run([*args, "run.name=whole"], tmp_path, 2)
    assert whole.codes == [0, 0], whole.output
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts(error: Exception, is_one: bool) -> None:
    assert out_of_memory.is_out_of_memory(error) == is_one


def told(micro_batch: int, *, halve: bool, lasting: bool = False) -> tuple[int, str]:
    problem = out_of_memory.problem(
        MemoryError(), where="rank 3, step 7", micro_batch=micro_batch, accumulation=5, seq_len=2048,
        planned="70.0 GiB in the loss: 40.0 GiB activations", halve=halve, others=["ZeRO 3", "more ranks"],
        lasting=lasting,
    )  # fmt: skip
    return problem.exit_code, problem.line


def test_the_lines() -> None:
    begin = "error: rank 3, step 7: out of memory with micro batch {} of 2048 tokens (planned: 70.0 GiB in "
    begin += "the loss: 40.0 GiB activations): MemoryError. Fix: "
    assert told(6, halve=True) == (
        75,
        begin.format(6) + "start the same command again: it goes on with micro batch 3 and accumulation 10",
    )
    for halve in (False, True):
        assert told(1, halve=halve) == (
            64,
            begin.format(1)
            + "a micro batch can't be smaller: use ZeRO 3, or more ranks, or as another recipe a smaller "
            "data.seq_len",
        )
    batch = "micro batch 3 and accumulation 10 in the DeepSpeed JSON"
    assert f"Fix: use {batch}, " in told(6, halve=False)[1]
    assert f"Fix: use ZeRO 3, or more ranks, or {batch}, " in told(6, halve=False, lasting=True)[1]
    built = out_of_memory.while_building(MemoryError(), where="rank 3", planned="9 GiB", others=["ZeRO 3"])
    assert built.line == (
        "error: rank 3: out of memory while the model and its optimizer are built (planned: 9 GiB): "
        "MemoryError. Fix: use ZeRO 3"
    )


def test_what_is_used_already_is_not_advised() -> None:
    means = partial(out_of_memory.other_means, on_cpu=False, offloads=False, world_size=8)
    assert means(stage=2, recompute="none") == [
        "compute.recompute=full", "ZeRO 3", "offload to the host", "more ranks",
    ]  # fmt: skip
    assert means(stage=3, recompute="full", offloads=True) == ["more ranks"]
    assert means(stage=0, recompute=None, on_cpu=True, world_size=1) == ["more ranks"]
    assert means(stage=0, recompute=None, on_cpu=True) == ["ZeRO 3"]


@pytest.mark.parametrize(("size", "next_one"), [(8, 4), (6, 3), (9, 3), (7, 1), (1, None)])
def test_the_next_smaller_one_divides_it(size: int, next_one: int | None) -> None:
    assert out_of_memory.smaller(size) == next_one


def test_what_is_remembered_is_of_the_micro_batch_that_is_stated(tmp_path: Path) -> None:
    assert out_of_memory.remembered(tmp_path, 8) == 8
    out_of_memory.remember(tmp_path, 8, 2)
    assert out_of_memory.remembered(tmp_path, 8) == 2
    assert out_of_memory.remembered(tmp_path, 4) == 4, "the user has changed the JSON since"
    for text in (
        "",
        "[]",
        '{"stated": 8}',
        '{"stated": 8, "micro_batch": 3}',
        '{"stated": 8, "micro_batch": 0}',
    ):
        (tmp_path / out_of_memory.REMEMBERED).write_text(text)
        assert out_of_memory.remembered(tmp_path, 8) == 8
    assert os.listdir(tmp_path) == [out_of_memory.REMEMBERED]
