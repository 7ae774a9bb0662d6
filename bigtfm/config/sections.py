"""The tables of the run config, one class each. Frozen; every field states its unit."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bigtfm.config.loss_path import LossPath

LARGEST = 2**63


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and value >= LARGEST:
                raise ValueError(f"{name} {value} is too large", f"set {name} to less than 2^63")
        return self


class RunSection(Section):
    """Name, place and length of the run."""

    name: str = Field(
        default="quickstart",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,  # a file name has at most 255 bytes
        description="name of the run, and of its folder below `dir`",
    )
    dir: str = Field(
        default="runs",
        min_length=1,
        description="folder that holds run directories; this run's is <dir>/<name>",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps at which to stop; unset: the horizon of the DeepSpeed JSON's scheduler",
    )
    seed: int = Field(
        default=1234, ge=0, lt=LARGEST, description="seed of the weights, the data order and dropout"
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="run directory whose weights a fresh run begins with (a training's, or what `bigtfm "
        "import-hf` wrote); unset: initial weights",
    )
    vectors: str | None = Field(
        default=None,
        min_length=1,
        description="file of word vectors (GloVe, word2vec or fastText) that a fresh run's token embedding "
        "begins with; unset: initial weights",
    )


class ModelSection(Section):
    """Shape of the Transformer. The vocabulary's size comes from the data set's header."""

    family: Literal["gpt", "bert", "encoder_decoder"] = Field(
        default="gpt",
        description="architecture: gpt (a decoder), bert (an encoder) or encoder_decoder (both)",
    )
    hidden_size: int = Field(default=192, ge=1, description="width of the residual stream, in features")
    num_layers: int = Field(
        default=4, ge=1, description="number of Transformer blocks; of an encoder_decoder, the encoder's"
    )
    num_decoder_layers: int | None = Field(
        default=None, ge=1, description="blocks of an encoder_decoder's decoder; unset: num_layers"
    )
    num_attention_heads: int = Field(default=6, ge=1, description="number of query heads")
    num_kv_heads: int | None = Field(
        default=None, ge=1, description="number of key/value heads (GQA); unset: as many as query heads (MHA)"
    )
    head_dim: int | None = Field(
        default=None, ge=1, description="features per head; unset: hidden_size / num_attention_heads"
    )
    ffn_hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="width of the feed-forward layer, in features; unset: 4 x hidden_size, or where it is "
        "gated (swiglu, geglu, geglu_tanh) 8/3 x hidden_size, rounded up to a multiple of 64",
    )
    max_seq_len: int = Field(
        default=128, ge=1, description="longest sequence that the model can read, in tokens"
    )
    positions: Literal["learned", "sinusoidal", "rotary", "relative"] = Field(
        default="rotary",
        description="how positions enter: learned or sinusoidal embeddings, rotary (RoPE), or relative (a "
        "learned bias on the scores by distance, as in T5)",
    )
    rotary_base: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    local_rotary_base: float | None = Field(
        default=None, gt=0, description="the same in blocks that attend within `window`; unset: rotary_base"
    )
    rotary_scaling: tuple[float, float, float, float] | None = Field(
        default=None,
        strict=False,
        description="Llama 3.1's stretched rotary frequencies: factor, low_freq_factor, high_freq_factor, "
        "original sequence length; unset: none",
    )
    relative_buckets: int = Field(
        default=32, ge=4, description="number of distances that `relative` tells apart"
    )
    relative_max_distance: int = Field(
        default=128, ge=8, description="from here on, in tokens, `relative` takes all distances for one"
    )
    window: int | None = Field(
        default=None,
        ge=1,
        description="self-attention reaches this many tokens back (and, in an encoder, ahead); unset: all",
    )
    global_every: int = Field(
        default=0,
        ge=0,
        description="with `window`: every n-th block, the first among them, attends to all; 0: none does",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(default="rmsnorm", description="kind of normalisation")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of the normalisation")
    norm_order: Literal["pre", "post"] = Field(
        default="pre",
        description="pre: before each sub-layer and at the end; post: after each sub-layer's residual sum",
    )
    embedding_norm: bool = Field(
        default=False,
        description="normalise the embedding (with norm_order pre, instead of the first attention norm)",
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh"] = Field(
        default="swiglu",
        description="activation of the feed-forward layer; swiglu, geglu and geglu_tanh gate it",
    )
    bias: bool = Field(default=False, description="biases in linear layers and layer norms")
    qkv_bias: bool | None = Field(
        default=None, description="biases of queries, keys and values; unset: as `bias`"
    )
    head_bias: bool = Field(default=False, description="a bias on the logits")
    tied_embeddings: bool = Field(
        default=True, description="the output layer shares the input embedding's weight"
    )
    scale_embeddings: bool | None = Field(
        default=None,
        description="multiply token embeddings by sqrt(hidden_size); unset: with sinusoidal positions alone",
    )
    attention_scale: float | None = Field(
        default=None, gt=0, description="factor on the attention scores; unset: 1 / sqrt(features per head)"
    )
    logit_scale: float = Field(
        default=1.0, gt=0, description="factor on the features before the output layer"
    )
    token_types: int = Field(
        default=0, ge=0, description="rows of the embedding that tells sentence A from B (bert); 0: none"
    )
    next_sentence: bool = Field(
        default=False,
        description="bert: a pooler over the first token and a head that tells whether B follows A",
    )
    decoder_start_id: int | None = Field(
        default=None,
        ge=0,
        description="token that an encoder_decoder's decoder reads first; unset: the data set's BOS",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=1,
        description="tokens that the model knows, where it knows more than the data have (an imported "
        "model); unset: the data set's, and what the objective adds",
    )
    num_labels: int | None = Field(
        default=None,
        ge=1,
        description="classes of the head that classification and tagging put in the place of the output "
        "layer; unset: the data set's labels",
    )
    vocab_multiple: int = Field(
        default=64,
        ge=1,
        description="the embedding is padded to a multiple of this many rows; padding never enters the loss",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability of dropping a feature after the embedding and after each sub-layer",
    )
    attention_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability of dropping an attention weight (by the reference attention: fused "
        "kernels draw random numbers that depend on the batch)",
    )
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="standard deviation of the initial weights; "
        "residual outputs use init_std / sqrt(2 num_layers)",
    )

    keep_zeros: bool = Field(
        default=False,
        description="weights of the blocks' matrices that are zero stay zero in training: a run that "
        "`bigtfm compress` has pruned stays pruned",
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelSection:
        hidden, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.kv_heads
        if self.head_dim is None and hidden % heads:
            raise ValueError(
                f"model.hidden_size {hidden} is not a multiple of model.num_attention_heads {heads}",
                f"set hidden_size to {-(-hidden // heads) * heads}, or state model.head_dim",
            )
        if heads % kv_heads:
            divisors = [str(number) for number in range(1, heads + 1) if heads % number == 0]
            raise ValueError(
                f"model.num_attention_heads {heads} is not a multiple of model.num_kv_heads {kv_heads}",
                f"set num_kv_heads to one of: {', '.join(divisors)}",
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"rotary positions need an even head size, not {self.head_size}",
                "set model.head_dim to an even number, or take other positions",
            )
        return self

    @model_validator(mode="after")
    def _keys_belong_together(self) -> ModelSection:
        """A key that would do nothing is a mistake, not a default."""
        family, rotary, relative = self.family, self.positions == "rotary", self.positions == "relative"
        idle = {
            "num_decoder_layers": (
                family != "encoder_decoder",
                "only an encoder_decoder has a decoder of its own",
            ),
            "decoder_start_id": (
                family != "encoder_decoder",
                "only an encoder_decoder has a decoder to start",
            ),
            "token_types": (family != "bert", "only a bert reads sentence pairs"),
            "next_sentence": (family != "bert", "only a bert reads sentence pairs"),
            "global_every": (self.window is None, "without model.window every block attends to all"),
            "local_rotary_base": (
                not rotary or self.window is None,
                "it needs rotary positions and model.window",
            ),
            "rotary_base": (not rotary, "it needs rotary positions"),
            "rotary_scaling": (not rotary, "it needs rotary positions"),
            "relative_buckets": (not relative, "it needs relative positions"),
            "relative_max_distance": (not relative, "it needs relative positions"),
        }
        for name, (is_idle, why) in idle.items():
            if is_idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"model.{name} does nothing here: {why}", f"leave model.{name} out")
        self._require_useful_positions()
        if self.next_sentence and self.token_types < 2:
            raise ValueError("model.next_sentence tells two sentences apart", "set model.token_types to 2")
        return self

    def _require_useful_positions(self) -> None:
        """Numbers that would send tokens to rows that are not there, or turn frequencies round."""
        if self.rotary_scaling is not None:
            factor, low, high, length = self.rotary_scaling
            if not (factor >= 1 and 0 < low < high and length >= 1):
                raise ValueError(
                    f"model.rotary_scaling {list(self.rotary_scaling)} is none",
                    "write a factor of 1 or more, 0 < low_freq_factor < high_freq_factor, and a length",
                )
        if self.positions == "relative":
            buckets, distance = self.relative_buckets, self.relative_max_distance
            one_sided = buckets if self.family == "gpt" else buckets // 2
            exact = (buckets if self.family != "bert" else one_sided) // 2
            if self.family != "gpt" and buckets % 2:
                raise ValueError(
                    f"model.relative_buckets {buckets} is odd, and half of them are for each direction",
                    f"set it to {buckets + 1}",
                )
            if distance <= exact:
                raise ValueError(
                    f"model.relative_max_distance {distance} leaves nothing to the buckets of ranges: "
                    f"{exact} of the {buckets} are for one distance each",
                    f"set relative_max_distance to more than {exact}, or relative_buckets to less",
                )

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def decoder_layers(self) -> int:
        """Blocks of an encoder_decoder's decoder."""
        return self.num_decoder_layers or self.num_layers

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer, in features."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.gated:  # three matrices instead of two: 8/3 keeps the parameter count (Shazeer 2020)
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of `vocab_size` tokens."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


class SourceSection(Section):
    """One of the data sets of a mixture. All have the same tokenizer; validation is the first one's."""

    path: str = Field(min_length=1, description="folder that `bigtfm prepare` wrote")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="share of the training sequences, relative to the other sources' weights; kept at every "
        "step within one sequence",
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="passes over this source at most; then the others fill its place; unset: no limit",
    )


class DataSection(Section):
    """Where the tokens come from."""

    path: str = Field(
        default="data/quickstart", min_length=1, description="folder that `bigtfm prepare` wrote"
    )
    sources: tuple[SourceSection, ...] = Field(
        default=(),
        strict=False,
        description="several such folders instead, mixed by weight: [[data.sources]] tables, or on the "
        'command line data.sources=\'[{path = "data/a", weight = 0.7}, {path = "data/b", weight = 0.3}]\'',
    )
    stream: str | None = Field(
        default=None,
        description="training text that is read and tokenized while training: "
        "hf:NAME[#REVISION][@CONFIG][:SPLIT], a data set of the Hugging Face hub or a local folder; `path` "
        "still gives tokenizer and validation; unset: the training split of `path`",
    )
    text_column: str = Field(default="text", min_length=1, description="column of the text in `stream`")
    seq_len: int | None = Field(
        default=None, ge=1, description="tokens in a training sequence; unset: model.max_seq_len"
    )
    packing: Literal["windows", "best_fit"] = Field(
        default="windows",
        description="how documents become training sequences: windows (cut from one stream of documents) or "
        "best_fit (whole documents put together so that few are cut; needs `bigtfm pack`)",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="processes per rank that make batches ahead of training; 0: a thread does",
    )
    verify: Literal["beside", "start", "never"] = Field(
        default="beside",
        description="when data sets over 256 MiB are compared with their SHA-256 (smaller ones always "
        "are, before the first step): beside (while training goes on, ranks taking turns; a difference ends "
        "the run with exit code 65), start (before the first step) or never",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if self.sources and "path" in self.model_fields_set:
            raise ValueError("data.path and data.sources both say what to read", "keep one of them")
        paths = [source.path for source in self.sources]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ValueError(
                f"data.sources has {twice} twice", "name it once, with the sum of the two weights"
            )
        if self.stream is not None and not (self.stream.startswith("hf:") and len(self.stream) > 3):
            raise ValueError(
                f"data.stream {self.stream} can't be streamed",
                "write hf:NAME[#REVISION][@CONFIG][:SPLIT], or `bigtfm prepare` the text",
            )
        if self.stream and self.sources:
            raise ValueError("data.stream and data.sources both say what to train on", "keep one of them")
        if self.stream and self.workers:
            raise ValueError(
                f"each of {self.workers} data.workers would read the whole of data.stream",
                "set data.workers to 0: a thread reads and tokenizes ahead",
            )
        if self.stream and self.packing == "best_fit":
            raise ValueError(
                "data.packing best_fit needs the length of every document, and a stream's are not known",
                "set data.packing to windows, or prepare the text and leave data.stream out",
            )
        if self.stream is None and self.text_column != "text":
            raise ValueError(
                "data.text_column does nothing without data.stream",
                "leave it out; `bigtfm prepare` has --text-column",
            )
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Folders of the prepared data sets; the first one's validation split is evaluated on."""
        return tuple(source.path for source in self.sources) or (self.path,)


Objective = Literal[
    "causal_lm", "masked_lm", "span_corruption", "infilling",
    "completion", "sequence_to_sequence", "classification", "tagging", "question_answering",
]  # fmt: skip
OBJECTIVES: dict[str, tuple[Objective, ...]] = {  # of each family; the first is its default
    "gpt": ("causal_lm", "completion", "classification", "tagging"),
    "bert": ("masked_lm", "classification", "tagging", "question_answering"),
    "encoder_decoder": ("span_corruption", "infilling", "sequence_to_sequence"),
}
LABELLED = ("classification", "tagging")  # a head with a class for each label
HEADED = (*LABELLED, "question_answering")  # a head in the output layer's place
SUPERVISED = (*HEADED, "completion", "sequence_to_sequence")  # they learn a task's examples


class ObjectiveSection(Section):
    """What is minimised."""

    kind: Objective | None = Field(
        default=None,
        description="what is predicted. Of text: causal_lm (gpt: the next token), masked_lm (bert: hidden "
        "tokens), span_corruption (encoder_decoder: the spans cut out, as T5), infilling (encoder_decoder: "
        "the text of which spans are hidden, as BART). Of a task's data set (`bigtfm prepare --task`): "
        "completion (gpt: the answer's tokens), sequence_to_sequence (encoder_decoder: the target's tokens), "
        "classification (gpt, bert: the example's label), tagging (gpt, bert: each word's label), "
        "question_answering (bert: where the answer begins and ends); unset: the family's first of text",
    )
    mask_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the tokens that is hidden, of text (not in causal_lm)"
    )
    mask_random: float = Field(
        default=0.1, ge=0, le=1, description="masked_lm: share of the hidden tokens that become random ones"
    )
    mask_keep: float = Field(
        default=0.1, ge=0, le=1, description="masked_lm: share of the hidden tokens that stay as they are"
    )
    whole_words: bool = Field(default=False, description="masked_lm: hide all tokens of a word, or none")
    span_length: float = Field(
        default=3.0, ge=1, description="span_corruption, infilling: mean length of a hidden span, in tokens"
    )
    next_sentence: float = Field(
        default=0.0,
        ge=0,
        description="masked_lm: weight of a pair's next-sentence loss, in hidden tokens; 0: no pairs "
        "(needs model.next_sentence)",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability mass spread over the vocabulary or the labels (training loss only)",
    )
    l1: float = Field(
        default=0.0,
        ge=0,
        description="L1 penalty on matrix weights, per step, as a multiple of the sum of |w| "
        "(L2: the DeepSpeed JSON's weight_decay)",
    )


class DistillSection(Section):
    """Learning from another run, a larger model of the family, besides the data (knowledge distillation)."""

    teacher: str | None = Field(
        default=None,
        min_length=1,
        description="run directory whose newest checkpoint teaches, frozen, whole on every rank; unset: none",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="divides both models' logits; the larger, the more the unlikely count"
    )
    weight: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the training loss that is the divergence from the teacher; the rest is the "
        "objective's",
    )

    @model_validator(mode="after")
    def _has_a_teacher(self) -> DistillSection:
        if self.teacher is None and self != DistillSection.model_construct():
            raise ValueError(
                "distill.temperature and distill.weight do nothing without a teacher", "set distill.teacher"
            )
        return self


ADAPTERS = (".lora_a", ".lora_b")  # ends of the names of an adapter's weights


class TuneSection(Section):
    """What of a model that has learnt before goes on learning."""

    train: Literal["all", "head"] = Field(
        default="all",
        description="all, or the task's head alone: the stack stays as run.init_from has it, and no backward "
        "pass goes through it",
    )
    lora_rank: int = Field(
        default=0,
        ge=0,
        description="rank of the adapters (LoRA) that learn in the model's place, beside a task's head; all "
        "else stays as it begins; 0: none",
    )
    lora_alpha: float = Field(
        default=16.0,
        gt=0,
        description="an adapter adds lora_alpha / lora_rank times its product to its matrix",
    )
    lora_on: Literal["attention", "all"] = Field(
        default="all", description="the blocks' matrices that have an adapter: those of attention, or all"
    )
    embeddings: bool = Field(
        default=True, description="whether the token embedding learns; false: it stays as it begins"
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="each block's lr is this times that of the block above it; the head has the JSON's lr, "
        "the embeddings the lowest; 1: one lr for all",
    )

    @property
    def lora_scale(self) -> float:
        """What an adapter's product is multiplied with."""
        return self.lora_alpha / self.lora_rank

    def adapts(self, name: str) -> bool:
        """Whether a matrix of a block, or its module, has an adapter."""
        return self.lora_rank > 0 and (self.lora_on == "all" or ".mlp." not in name)

    @property
    def freezes(self) -> bool:
        """Whether parameters stay as they begin: some, or all but a head and adapters."""
        return self.train == "head" or self.lora_rank > 0 or not self.embeddings

    def learns(self, name: str) -> bool:
        """Whether a parameter learns; the others have neither gradients nor fp32 masters nor moments."""
        if self.train == "head" or self.lora_rank:
            return name.startswith("task_head.") or name.endswith(ADAPTERS)
        return self.embeddings or name != "embed_tokens.weight"


Backend = Literal[
    "flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "flex",
    "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "reference",
]  # fmt: skip


USED_BY: dict[str, tuple[Objective, ...]] = {  # fields that do nothing for the other kinds
    "mask_fraction": ("masked_lm", "span_corruption", "infilling"),
    "mask_random": ("masked_lm",),
    "mask_keep": ("masked_lm",),
    "whole_words": ("masked_lm",),
    "span_length": ("span_corruption", "infilling"),
    "next_sentence": ("masked_lm",),
}


class BatchSection(Section):
    """A global batch that grows: sizes before the DeepSpeed JSON's. Each step's is made by accumulation."""

    rampup_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        strict=False,
        description="global batches of the first steps, in sequences, each larger than the one before and a "
        "multiple of micro batch x ranks; then comes the DeepSpeed JSON's. Empty: it comes at once",
    )
    rampup_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), strict=False, description="optimizer steps that each of `rampup_sizes` is kept for"
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.rampup_sizes) != len(self.rampup_steps):
            raise ValueError(
                f"batch.rampup_sizes has {len(self.rampup_sizes)} entries and batch.rampup_steps "
                f"{len(self.rampup_steps)}",
                "state a number of steps for each size",
            )
        if list(self.rampup_sizes) != sorted(set(self.rampup_sizes)):
            raise ValueError("batch.rampup_sizes must grow", "write them in increasing order, each once")
        return self


class ComputeSection(Section):
    """How it is computed; nothing here but fp8 changes what is computed."""

    recompute: Literal["none", "full", "selective"] | Annotated[int, Field(ge=1)] = Field(
        default="none",
        description="activation checkpointing: none, full (every block), selective (keeps matrix products), "
        "or n (every n-th block)",
    )
    attention: Literal["auto", Backend] = Field(
        default="auto",
        description="attention kernels: auto (the fastest that device and model allow; `bigtfm check` names "
        "it), or one of them",
    )
    loss: Literal["auto", LossPath] = Field(
        default="auto",
        description="cross-entropy over the vocabulary: whole (all logits at once), compiled (the same by "
        "torch.compile) or chunked (few at a time, gradients beside the loss: less memory; not in fp16); "
        "auto: on a CPU chunked in fp32, else whole; on a GPU compiled, or chunked where logits would take "
        "more than an eighth of its memory",
    )
    compile_blocks: bool = Field(default=False, description="compile the blocks with torch.compile")
    kernels: Literal["auto", "torch", "liger"] = Field(
        default="auto",
        description="RMSNorm, SwiGLU and rotary positions in blocks that are not compiled: torch, or liger "
        "(Liger Kernel's fused kernels, on a GPU); auto: liger where it is installed and can serve",
    )
    fp8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = Field(
        default="none",
        description="the blocks' matrix products in 8 bits, by one of torchao's recipes; part of the recipe, "
        "since it moves the loss, and emulated where the device has no such products",
    )

    @model_validator(mode="after")
    def _compiles(self) -> ComputeSection:
        if self.compile_blocks and self.recompute == "selective":
            raise ValueError(
                "compute.recompute selective can't look into compiled blocks",
                "set recompute to none, full or a number, or compile_blocks to false",
            )
        if self.compile_blocks and self.kernels == "liger":
            raise ValueError(
                "compute.kernels liger has nothing to do in compiled blocks, whose kernels torch makes",
                "set compile_blocks to false, or kernels to auto",
            )
        return self


class EvalSection(Section):
    """Evaluation on the validation split while training."""

    every: int = Field(default=50, ge=0, description="steps between evaluations; 0: only at the end")
    tokens: int = Field(
        default=1_000_000, ge=1, description="at most this many validation tokens an evaluation"
    )
    patience: int = Field(
        default=0, ge=0, description="stop early after this many evaluations without improvement; 0: never"
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="smallest drop of the validation loss that counts as improvement, in nats a token",
    )


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(default=100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(
        default=2,
        ge=1,
        description="how many of the newest checkpoints to keep; the best one is kept besides",
    )
    keep_every: int = Field(
        default=0,
        ge=0,
        description="keep every checkpoint whose step is a multiple of this, too; 0: none",
    )
    asynchronous: bool = Field(
        default=True,
        description="write checkpoints while training goes on: it waits only for the copy to host memory, "
        "which takes as much of it as a checkpoint's shard; false: it waits for the disk",
    )
    retry_seconds: float = Field(
        default=30.0,
        ge=0,
        description="seconds for which a checkpoint or a row of metrics.jsonl that can't be written is tried "
        "again while training goes on; then the run ends with exit code 74",
    )


class GuardSection(Section):
    """What keeps a run alive, and ends it rather than let it hang or go wrong."""

    hang_seconds: float = Field(
        default=120.0,
        ge=0,
        description="a phase of a step that lasts longer than this, and than ten times its longest so far, "
        "is a hang: the job ends with exit code 79 and says where every rank stands; 0: never",
    )
    start_seconds: float = Field(
        default=1800.0,
        ge=0,
        description="the same for what is done for the first time: meeting the other ranks, building, the "
        "first step with its compilation, the first evaluation, the first save; 0: never",
    )
    straggler: float = Field(
        default=1.5,
        ge=0,
        description="a rank that takes this many times as long as the median rank for its own work is named "
        "in a note; 0: never",
    )
    bad_steps: int = Field(
        default=3,
        ge=0,
        description="steps in a row that are left out because their loss or a gradient is not finite; one "
        "more ends the run with exit code 70",
    )
    spike: float = Field(
        default=0.0,
        ge=0,
        description="a loss this many standard deviations above the mean of the `spike_window` steps before "
        "is a spike: the run goes back to the last checkpoint and leaves out the data before it; 0: never",
    )
    spike_window: int = Field(
        default=100, ge=8, description="steps that a loss is compared with (fewer: no spike)"
    )
    spike_skip: int = Field(
        default=10, ge=1, description="steps whose data are left out after a spike: its own, and those before"
    )
    spike_lr: float = Field(
        default=1.0, gt=0, le=1, description="the lr is multiplied by this at every spike, from there on"
    )
    spikes: int = Field(default=3, ge=1, description="spikes of a run; one more ends it with exit code 70")
    replicas_every: int = Field(
        default=500,
        ge=0,
        description="steps between comparisons of the ranks' copies of the weights (ZeRO 0 to 2), which find "
        "memory or a GPU that computes wrongly; 0: never",
    )
    halve_micro_batch: bool = Field(
        default=False,
        description="when memory runs out, start again with half the micro batch and twice the accumulation: "
        "the same global batch and loss",
    )


class TrackSection(Section):
    """Metrics and where they go. metrics.jsonl is always written."""

    every: int = Field(
        default=10, ge=1, description="steps between progress lines when the output is not a terminal"
    )
    mlflow: bool = Field(
        default=True,
        description="send metrics to MLflow, in a process of its own that training never waits for",
    )
    uri: str = Field(default="sqlite:///mlflow.db", min_length=1, description="MLflow tracking URI")
    experiment: str = Field(default="bigtfm", min_length=1, description="MLflow experiment")


class ResumeSection(Section):
    """What may change when a run directory is resumed."""

    allow: tuple[
        Literal["data", "model", "tokenizer", "seed", "objective", "distill", "recipe", "probe"], ...
    ] = Field(
        default=(),
        strict=False,
        description="changes to accept when resuming: data, model (what leaves the shapes, such as dropout), "
        "tokenizer, seed, objective, distill (the teacher), recipe "
        "(the DeepSpeed JSON's optimizer, scheduler, clipping and global batch), or probe (the checkpoint's "
        "probe batch has another loss than when it was saved)",
    )
