"""`bigtfm submit`: slurm/train.sbatch with a job's own values in it, handed to sbatch."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtfm.config.problems import ConfigProblem, did_you_mean
from bigtfm.resilience.events import note

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)")
_KNOB = re.compile(r': "\$\{([A-Z_]+):=')
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_EARLY = 60  # seconds by which Slurm may be early with the warning of --signal
_OPTIONS = ("CONFIG", "DEEPSPEED_CONFIG", "OVERRIDES", "RUN_DIR")  # knobs that submit's own arguments set


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm. time: of one start, as sbatch takes it; knobs: NAME=VALUE for the script."""

    nodes: int
    gpus_per_node: int
    time: str
    partition: str | None = None
    options: tuple[str, ...] = ()  # more of sbatch's own, --name=value
    knobs: tuple[str, ...] = ()

    def script(self, run_dir: Path, config: Path, deepspeed_config: Path, overrides: Sequence[str]) -> str:
        """A batch script that stands for itself: submitted again, it goes on with the same run.

        Raises:
            ConfigProblem: an option or a knob is none.
        """
        template = shipped("train.sbatch")
        known = [name for name in _KNOB.findall(template) if name not in _OPTIONS]
        files = {"CONFIG": config, "DEEPSPEED_CONFIG": deepspeed_config, "RUN_DIR": run_dir}
        knobs = {name: str(path) for name, path in files.items()}
        knobs |= {"OVERRIDES": " ".join(overrides)} if overrides else {}
        for given in self.knobs:
            name, equals, value = given.partition("=")
            if name not in known or not equals:
                fix = did_you_mean(name, known) if name not in known else "write NAME=VALUE"
                raise ConfigProblem(f"--set {given}: no such variable", where="command line", fix=fix)
            knobs[name] = value
        for words in overrides:
            if any(letter.isspace() for letter in words):
                fix = "write it into the run config"
                raise ConfigProblem(f"'{words}' holds a space", where="command line", fix=fix)
        text = _filled(template, self._directives(run_dir), knobs)
        _check_time(text)
        return text

    def _directives(self, run_dir: Path) -> dict[str, str]:
        found = {
            "job-name": run_dir.name,
            "nodes": str(self.nodes),
            "gpus-per-node": str(self.gpus_per_node),
            "ntasks-per-node": str(self.gpus_per_node),
            "time": self.time,
            "output": str(run_dir / "logs" / "slurm-%j.log"),
        }
        found |= {"partition": self.partition} if self.partition else {}
        for option in self.options:
            name, _, value = option.removeprefix("--").partition("=")
            if not re.fullmatch(r"--[a-z-]+(=.+)?", option, flags=re.DOTALL) or "\n" in value:
                raise ConfigProblem(
                    f"--sbatch {option}: not an option",
                    where="command line",
                    fix="write --sbatch=--name=value",
                )
            found[name] = value
        return found


def _filled(template: str, directives: Mapping[str, str], knobs: Mapping[str, str]) -> str:
    """The template with its #SBATCH lines replaced, and the knobs set before they get their defaults."""
    left, lines = dict(directives), list[str]()
    for line in template.splitlines():
        found = _DIRECTIVE.match(line)
        if found and found[1] in left:
            line = _directive(found[1], left.pop(found[1]))
        elif lines and lines[-1].startswith("#SBATCH") and not found:
            lines += [_directive(name, value) for name, value in left.items()]
            lines += ["", *(f"export {name}={shlex.quote(value)}" for name, value in knobs.items())]
            left = {}
        lines.append(line)
    return "\n".join(lines) + "\n"


def _directive(name: str, value: str) -> str:
    if any(letter.isspace() for letter in value) and not set(value) & set("'\""):
        value = f'"{value}"'
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _check_time(text: str) -> None:
    """The script's limit is one, and leaves time to train before the warning that comes ahead of it."""
    (limit,) = re.findall(r"^#SBATCH --time=(.*)", text, flags=re.MULTILINE)
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return
    found = _TIME.fullmatch(limit)
    if found is None:
        fix = "write minutes, H:MM:SS, D-H or D-H:MM:SS"
        raise ConfigProblem(f"--time={limit}: no time limit", where="command line", fix=fix)
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # minutes[:seconds]
        parts = [0, *parts[:2]]
    seconds = 86400 * days + 3600 * parts[0] + 60 * parts[1] + parts[2]
    lead = re.search(r"^#SBATCH --signal=.*@(\d+)$", text, flags=re.MULTILINE)
    before = int(lead[1]) + _EARLY if lead else 0
    if seconds <= before:
        raise ConfigProblem(
            f"--time={limit}: no time to train, as the job is told to stop up to {before} s before",
            where="command line",
            fix="ask for more, or be told later: --sbatch=--signal=USR1@30",
        )


def shipped(name: str) -> str:
    """A script of slurm/: beside the package in a clone, within it where it was installed."""
    package = Path(__file__).parent
    for folder in (package / "scripts", package.parents[1] / "slurm"):
        if (folder / name).exists():
            return (folder / name).read_text(encoding="utf-8")
    raise ConfigProblem(f"slurm/{name} is not there", where="bigtfm", fix="install bigtfm again")


def write_script(run_dir: Path, text: str) -> Path:
    """RUN/train.sbatch, and the folder that Slurm writes the job's log into."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / "train.sbatch"
    path.write_text(text, encoding="utf-8")
    return path


def submit(script: Path) -> str:
    """The job's number, noted in the events of the run whose script it is.

    Raises:
        ConfigProblem: there is no sbatch here, or it refuses, in its words.
    """
    job = _slurm("sbatch", "--parsable", str(script)).strip().split(";")[0]
    note(script.parent, "submitted", job=job)
    return job


def queue(job: str) -> str:
    """What squeue says of the job: state, time, nodes, and when or why."""
    return _slurm("squeue", "-j", job, "-o", "%.10i %.20j %.10T %.12M %.12l %.6D %.20S %R")


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        fix = "use a login node of the cluster, or --dry-run"
        raise ConfigProblem(f"there is no {command[0]} here", where="Slurm", fix=fix) from None
    except subprocess.TimeoutExpired:
        fix = "try again later; see `scontrol ping`"
        raise ConfigProblem(f"{command[0]} gives no answer", where="Slurm", fix=fix) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"{command[0]} ended with code {done.returncode}"
        raise ConfigProblem(said, where="Slurm", fix="see `sinfo` and what the partition allows")
    return done.stdout
