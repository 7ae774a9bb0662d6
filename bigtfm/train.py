"""Training: one readable function holds the loop."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from bigtfm.check import Resolved
from bigtfm.config.deepspeed import DeepSpeedConfig
from bigtfm.config.launch import Launch
from bigtfm.config.problems import ConfigProblem, NumericsProblem, RequeueRequested, StorageProblem
from bigtfm.config.run import RunConfig
from bigtfm.data import order
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.loader import Loader
from bigtfm.engine import checkpoint, distributed, fragments
from bigtfm.engine.build import build_engine, local_grad_norm
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.distributed import Ranks
from bigtfm.evaluate import bits_per_byte, unigram_bits_per_byte, validation_loss
from bigtfm.model.gpt import GPT
from bigtfm.planner.throughput import flops_per_token, peak_flops
from bigtfm.recorder import Recorder
from bigtfm.resilience.numerics import require_finite
from bigtfm.resilience.signals import StopRequest


def train(run: RunConfig, deepspeed: DeepSpeedConfig, resolved: Resolved, launch: Launch) -> None:
    """Trains until `resolved.steps`, an early stop or a signal; resumes what stands in the run directory.

    Returning (exit code 0) means: finite weights, every step applied, a verified checkpoint.

    Raises:
        Problem: see its subclasses for what and for the exit code.
    """
    stop = StopRequest()
    ranks = distributed.start(launch)
    dataset = TokenDataset.open(run.data.path)
    engine = build_engine(
        lambda: GPT(
            run.model,
            dataset.vocab_size,
            seed=run.run.seed,
            label_smoothing=run.objective.label_smoothing,
            l1=run.objective.l1,
            recompute=run.compute.recompute,
        ),
        deepspeed.resolved(run.model, resolved.steps),
        recompute=run.compute.recompute,
    )
    loader = Loader(dataset.split("train"), run.seq_len, run.run.seed, dataset.vocab_size)
    validation = Loader(dataset.split("validation"), run.seq_len, run.run.seed, dataset.vocab_size, shuffle=False)
    progress = resume(run, dataset, engine, ranks)
    
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    checkpoints = run.run_dir / "checkpoints"
    return None
