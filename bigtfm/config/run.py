"""The run config: model, data, objective, steps, evaluation, saving. Read from TOML, then `key=value` overrides.

It has no field for anything that the DeepSpeed JSON has a key for (batch sizes, precision, optimizer, schedule, clipping,
ZeRO): those live there and only there. The defaults are the quickstart's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bigtfm.config.problems import ConfigProblem, did_you_mean


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """Name, place and length of the run."""

    name: str = Field("quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, and of its folder below `dir`")
    dir: str = Field("runs", min_length=1, description="folder that holds run directories; this run's is <dir>/<name>")
    steps: int | None = Field(None, ge=1, description="optimizer steps at which to stop; unset: the horizon of the DeepSpeed JSON's scheduler")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of the weights, the data order and dropout")


class ModelSection(Section):
    """Shape of the Transformer. The vocabulary's size comes from the data set's header."""

    family: Literal["gpt"] = Field("gpt", description="architecture: gpt (decoder, pre-norm)")
    hidden_size: int = Field(192, ge=1, description="width of the residual stream, in features")
    num_layers: int = Field(4, ge=1, description="number of Transformer blocks")
    num_attention_heads: int = Field(6, ge=1, description="number of query heads")
    num_kv_heads: int | None = Field(None, ge=1, description="number of key/value heads (GQA); unset: as many as query heads (MHA)")
    head_dim: int | None = Field(None, ge=1, description="features per head; unset: hidden_size / num_attention_heads")
    ffn_hidden_size: int | None = Field(None, ge=1, description="width of the feed-forward layer, in features; unset: 4 x hidden_size, or 8/3 x rounded up to a multiple of 64 with swiglu")
    max_seq_len: int = Field(128, ge=1, description="longest sequence that the model can read, in tokens")
    positions: Literal["learned", "sinusoidal", "rotary"] = Field("rotary", description="how positions enter: learned or sinusoidal embeddings, or rotary (RoPE)")
    rotary_base: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="normalisation before each sub-layer and at the end")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the normalisation")
    activation: Literal["gelu", "relu", "swiglu"] = Field("swiglu", description="activation of the feed-forward layer (gelu: tanh approximation)")
    bias: bool = Field(False, description="biases in linear layers and layer norms")
    tied_embeddings: bool = Field(True, description="the output layer shares the input embedding's weight")
    vocab_multiple: int = Field(64, ge=1, description="the embedding is padded to a multiple of this many rows; padding never enters the loss")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping a feature after the embedding and after each sub-layer")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights; residual outputs use init_std / sqrt(2 num_layers)")

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelSection:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}")
        return self

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer, in features."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.activation == "swiglu":  # three matrices instead of two: 8/3 keeps the parameter count (Shazeer 2020)
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of `vocab_size` tokens."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


class DataSection(Section):
    """Where the tokens come from."""

    path: str = Field("data/quickstart", min_length=1, description="folder that `bigtfm prepare` wrote")
    seq_len: int | None = Field(None, ge=1, description="tokens in a training sequence; unset: model.max_seq_len")


class ObjectiveSection(Section):
    """What is minimised."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability mass spread over the vocabulary (training loss only)")
    l1: float = Field(0.0, ge=0, description="L1 penalty on matrix weights, per step, as a multiple of the sum of |w| (L2: the DeepSpeed JSON's weight_decay)")


class ComputeSection(Section):
    """How it is computed; nothing here changes what is computed."""

    recompute: Literal["none", "full", "selective"] | int = Field("none", description="activation checkpointing: none, full (every block), selective (keeps matrix products), or n (every n-th block)")

    @model_validator(mode="after")
    def _positive(self) -> ComputeSection:
        if isinstance(self.recompute, int) and (isinstance(self.recompute, bool) or self.recompute < 1):
            raise ValueError(f"recompute must be none, full, selective or a number of blocks >= 1, not {self.recompute}")
        return self


class EvalSection(Section):
    """Evaluation on the validation split while training."""

    every: int = Field(50, ge=0, description="steps between evaluations; 0: only at the end")
    tokens: int = Field(1_000_000, ge=1, description="at most this many validation tokens an evaluation")
    patience: int = Field(0, ge=0, description="stop early after this many evaluations without improvement; 0: never")
    min_delta: float = Field(0.0, ge=0, description="smallest drop of the validation loss that counts as improvement, in nats a token")


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints to keep; the best one is kept besides")


class TrackSection(Section):
    """Metrics and where they go. metrics.jsonl is always written."""

    every: int = Field(10, ge=1, description="steps between progress lines when the output is not a terminal")
    mlflow: bool = Field(True, description="send metrics to MLflow, in a process of its own that training never waits for")
    uri: str = Field("sqlite:///mlflow.db", min_length=1, description="MLflow tracking URI")
    experiment: str = Field("bigtfm", min_length=1, description="MLflow experiment")


class ResumeSection(Section):
    """What may change when a run directory is resumed."""

    allow: tuple[Literal["data", "model", "tokenizer", "seed", "objective"], ...] = Field((), strict=False, description="changes to accept when resuming: data, model, tokenizer, seed, objective")


class RunConfig(Section):
    """One run. Frozen; every field states its unit."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    compute: ComputeSection = ComputeSection()
    eval: EvalSection = EvalSection()
    save: SaveSection = SaveSection()
    track: TrackSection = TrackSection()
    resume: ResumeSection = ResumeSection()

    @model_validator(mode="after")
    def _sequence_fits(self) -> RunConfig:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        return self

    @property
    def seq_len(self) -> int:
        """Tokens in a training sequence."""
        return self.data.seq_len or self.model.max_seq_len

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.dir) / self.run.name


def load_run_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the TOML file at `path` (if any), then `key=value` overrides.

    Raises:
        ConfigProblem: the file can't be read, is no TOML, or a key or value is wrong.
    """
    where = str(path) if path else "run config"
    values = _read_toml(path) if path else {}
    for override in overrides:
        _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigProblem("no such file", where=str(path), fix="pass an existing run config with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigProblem(f"can't be read: {error}", where=str(path), fix="pass a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblem(f"not valid TOML: {error}", where=str(path), fix="correct that line") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigProblem(f"'{override}' is not key=value", where="command line", fix="write for example run.steps=1000")
    table, name = _locate(key)
    section = values.setdefault(table, {})
    if not isinstance(section, dict):
        raise ConfigProblem(f"'{table}' is not a table", where="run config", fix=f"write [{table}] above its keys")
    section[name] = _parse_value(text)


def _locate(key: str) -> tuple[str, str]:
    """Table and field of `key`: 'run.steps', or 'steps' where only one table has that field."""
    tables = {table: field.annotation.model_fields for table, field in RunConfig.model_fields.items()}  # type: ignore[union-attr]
    paths = [f"{table}.{name}" for table, fields in tables.items() for name in fields]
    matches = [path for path in paths if path == key or path.partition(".")[2] == key]
    if len(matches) > 1:
        raise ConfigProblem(f"key '{key}' is ambiguous", where="command line", fix=f"write one of: {', '.join(matches)}")
    if not matches:
        raise ConfigProblem(f"unknown key '{key}'", where="command line", fix=did_you_mean(key, paths))
    table, _, name = matches[0].partition(".")
    return table, name


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (numbers, booleans, lists, quoted text), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, where: str) -> ConfigProblem:
    """One line for the first thing that is wrong, and how many more there are."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("literal[", "int", "tuple")))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        table, _, name = key.rpartition(".")
        section = RunConfig.model_fields[table].annotation if table else RunConfig
        return ConfigProblem(
            f"unknown key '{key}'{more}", where=where, fix=did_you_mean(name, section.model_fields)  # type: ignore[union-attr]
        )
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict) or first["type"] == "value_error" else f", not {first['input']!r}"
    field = _field(key)
    hint = f"{key}: {field.description}" if field is not None and field.description else "make the values fit together"
    return ConfigProblem(f"{key + ': ' if key else ''}{message}{shown}{more}", where=where, fix=hint)


def _field(key: str) -> Any:
    table, _, name = key.partition(".")
    section = RunConfig.model_fields.get(table)
    return section.annotation.model_fields.get(name) if section is not None and name else None  # type: ignore[union-attr]
