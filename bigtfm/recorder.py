"""What rank 0 keeps and shows of a run: metrics.jsonl, progress lines, MLflow mirror, summary."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bigtfm import mlflow_mirror
from bigtfm.config.problems import RequeueRequested
from bigtfm.console import Console, Summary
from bigtfm.engine.checkpoint import Progress
from bigtfm.environment import started_at
from bigtfm.evaluate import bits_per_byte, predicted_tokens
from bigtfm.job import Job
from bigtfm.mlflow_sender import read_json
from bigtfm.planner.throughput import flops_per_token, peak_flops
from bigtfm.resilience import events
from bigtfm.tracking import MetricsLog, iterate_metrics, plot_curve, read_metrics


class Recorder:
    """Fed by the loop after every step. Only metrics.jsonl is written in the loop's own time."""

    def __init__(self, job: Job, progress: Progress, device: str) -> None:
        run, resolved = job.run, job.resolved
        self._job, self._began = job, time.monotonic()
        self._flops = flops_per_token(run.model, resolved.vocab_size, run.seq_len, run.objective, run.tune)
        self._peak = peak_flops(device, resolved.precision)
        self._log = MetricsLog(run.run_dir / "metrics.jsonl", run.save.retry_seconds)
        last = self._log.truncate_after(progress.step)
        self._console = Console(
            resolved.steps, progress.step, every=run.track.every, steps_left=resolved.batch.steps_left
        )
        if progress.step >= resolved.steps:
            beyond = resolved.horizon is not None and resolved.horizon > resolved.steps
            more = f"; a larger run.steps goes on, up to {resolved.horizon}" if beyond else ""
            self._console.note(f"{run.run_dir} has already run its {progress.step} steps{more}")
        elif progress.step:
            self._console.note(f"resuming {run.run_dir} after step {progress.step}")
        if last != progress.step:
            events.note(run.run_dir, "rows missing", last=last, step=progress.step)
            self._console.note(
                f"metrics.jsonl has no rows from step {last + 1} to {progress.step}; the checkpoint of step "
                f"{progress.step} is whole"
            )
        events.note(
            run.run_dir,
            "start",
            began=round(started_at(), 3),
            step=progress.step,
            ranks=resolved.world_size,
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )
        self._console.note(f"attention {job.attention.reason}")
        if run.tune.lora_rank and not run.run.init_from:
            self._console.note(
                "tune.lora_rank without run.init_from: adapters beside initial weights, which stay"
            )
        self._mirror = None
        if run.track.mlflow:
            self._mirror = mlflow_mirror.start(
                run.run_dir,
                uri=run.track.uri,
                experiment=run.track.experiment,
                name=run.run.name,
                params={
                    "run": run.model_dump(mode="json"),
                    "deepspeed": job.deepspeed.values,
                    "resolved": asdict(resolved),
                },
                artifacts=("run.toml", "deepspeed.json", "resolved.json"),
            )

    def step(
        self, row: dict[str, Any], tokens: int, rate: float, seconds: float, digest: str, improved: bool
    ) -> None:
        """Completes a step's row (step, loss, lr, grad_norm, maybe val_loss) and passes it on.

        tokens: read so far. rate: tokens a second in this step. improved: it has the best evaluation.
        """
        row |= {"tokens": tokens, "tokens_per_second": rate, "seconds": seconds, "sample_digest": digest}
        if self._peak is not None:
            row["mfu"] = rate * self._flops / (self._peak.flops * self._job.resolved.world_size)
        self._add_bits_per_byte(row)
        self._log.append(row)
        self._console.step(row)
        self._show_evaluation(row, improved)

    def late_evaluation(self, found: dict[str, Any], improved: bool) -> None:
        """Completes the last row by the evaluation (val_loss) that a signal had cut short."""
        *_, last = iterate_metrics(self._log.path)
        row = last | found
        self._add_bits_per_byte(row)
        self._log.truncate_after(row["step"] - 1)
        self._log.append(row)
        self._show_evaluation(row, improved)

    def _add_bits_per_byte(self, row: dict[str, Any]) -> None:
        if "val_loss" in row and self._job.run.objective_kind == "causal_lm":  # else not all are predicted
            split = self._job.dataset.split("validation")
            bits = bits_per_byte(row["val_loss"], predicted_tokens(split), split.num_bytes)
            row["val_bits_per_byte"] = bits

    def _show_evaluation(self, row: dict[str, Any], improved: bool) -> None:
        if "val_loss" in row:
            self._console.evaluation(
                row["step"], row["val_loss"], row.get("val_bits_per_byte"), best=improved
            )

    def flush(self) -> None:
        """Brings metrics.jsonl to the disk; raises OSError."""
        self._log.flush()

    def warning(self, text: str) -> None:
        """A line among those of the steps."""
        self._console.warning(text)

    def went_back(self, step: int, cut: str) -> None:
        """Moves the rows behind `step` from metrics.jsonl into RUN/logs/`cut`."""
        self._log.truncate_after(step, cut=self._job.run.run_dir / "logs" / cut)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """After a failure: ends the lines and tells MLflow how the run ended."""
        if error is None:
            return
        self._console.close()
        self._log.close()
        if self._mirror is not None:
            self._mirror.finish("KILLED" if isinstance(error, RequeueRequested) else "FAILED")

    def summary(self, progress: Progress, last_checkpoint: Path) -> None:
        """The end of a run that ended well: what came of it and what to try next."""
        run_dir = self._job.run.run_dir
        self._console.close()
        self._log.close()
        events.note(run_dir, "end", code=0, what="done", where=str(run_dir), step=progress.step)
        rows = read_metrics(run_dir / "metrics.jsonl")
        evaluated = [row for row in rows if "val_loss" in row][-1:]
        curve = plot_curve(run_dir)
        mlflow_run = self._mirror.finish() if self._mirror is not None else None
        self._console.summary(
            Summary(
                run_dir=run_dir,
                steps=progress.step,
                tokens=progress.tokens,
                seconds=time.monotonic() - self._began,
                loss=rows[-1]["loss"] if rows else None,
                val_loss=evaluated[0]["val_loss"] if evaluated else None,
                val_bits_per_byte=evaluated[0].get("val_bits_per_byte") if evaluated else None,
                unigram_bits_per_byte=read_json(run_dir / "resolved.json").get("unigram_bits_per_byte"),
                best_step=progress.best_step,
                checkpoint=last_checkpoint,
                curve=curve,
                mlflow_run=mlflow_run,
                next_commands=self._next_commands(mlflow_run),
            )
        )

    def _next_commands(self, mlflow_run: str | None) -> tuple[tuple[str, str], ...]:
        run_dir = shlex.quote(str(self._job.run.run_dir))
        prompts = {
            "causal_lm": "My fellow Americans,",
            "masked_lm": "My fellow <mask>,",
            "span_corruption": "My fellow <extra_id_0>,",
            "infilling": "My fellow <mask>,",
        }
        commands = [("see how good it is", f"bigtfm evaluate --run {run_dir} --data HELD_OUT")]
        if (prompt := prompts.get(self._job.run.objective_kind)) is not None:
            commands = [("see what it writes", f'bigtfm generate --run {run_dir} --prompt "{prompt}"')]
        elif (task := self._job.dataset.header.task) is not None and task.name == "chat":
            commands.append(("talk to it", f"bigtfm chat --run {run_dir}"))
        if mlflow_run is not None:
            commands.append(("see the curves", "make ui"))
        elif self._mirror is not None:
            commands.append(("send it to MLflow, which did not answer in time", f"bigtfm sync {run_dir}"))
        return tuple(commands)
