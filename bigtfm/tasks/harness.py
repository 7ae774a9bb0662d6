"""A run as a model of EleutherAI's lm-evaluation-harness: --model bigtfm --model_args run=RUN.

bigtfm harness run --model bigtfm --model_args run=runs/mine --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from bigtfm.config.problems import ConfigProblem
from bigtfm.console import progress_bar
from bigtfm.data.tokenizer import text_of
from bigtfm.generation.decoding import inference, pack
from bigtfm.generation.sampling import generate
from bigtfm.model.gpt import GPT
from bigtfm.run_directory import open_run
from bigtfm.tasks.predictor import batches

BATCH_TOKENS = 4096
Pair = tuple[list[int], list[int]]  # context and continuation


@register_model("bigtfm")
class Bigtfm(TemplateLM):
    """A gpt's newest checkpoint, in fp32; texts begin with BOS, as in training.

    run: run directory. batch_tokens: tokens of a batch, about. The harness's batch_size, device and dtype
    have no say.

    Raises:
        ConfigProblem: the run is no gpt that writes.
        NoCheckpoint, DataProblem: as `open_run`.
    """

    backend = "causal"

    def __init__(self, run: str, batch_tokens: int = BATCH_TOKENS, max_gen_toks: int = 256, **_: Any) -> None:
        super().__init__()
        model, self.bigtfm_tokenizer, self.special = open_run(Path(run))
        if not isinstance(model, GPT) or model.task_head is not None:
            raise ConfigProblem(
                f"a {model.config.family} of {model.objective.kind} foretells no text",
                where=run,
                fix="pass the run of a gpt",
            )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.run, self.batch_tokens, self.max_gen_toks = run, int(batch_tokens), int(max_gen_toks)

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.special.eos

    @property
    def prefix_token_id(self) -> int:
        return self.special.bos

    @property
    def tokenizer_name(self) -> str:
        return self.bigtfm_tokenizer.identity

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return list(self.bigtfm_tokenizer.encode(string))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding would write it) of each request."""
        prefix = self.prefix_token_id
        pairs = [(ids if ids[:1] == [prefix] else [prefix, *ids], more) for _, ids, more in requests]
        return self._scored(pairs, disable_tqdm)

    def _scored(self, pairs: Sequence[Pair], silent: bool) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        lengths = [len(context) + len(more) for context, more in pairs]
        with inference(self.model), progress_bar("scoring", on=not silent) as step:
            for numbers in batches(lengths, self.batch_tokens, step):
                for n, score in zip(numbers, self._score([pairs[n] for n in numbers]), strict=True):
                    found[n] = score
        return found

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """As much of the context as the model reads; the continuation's tokens are all scored."""
        read = [(context + more)[:-1][-self.max_length :] for context, more in pairs]
        input_ids, places, _, documents = pack(read, self.model.embed_tokens.weight.device)
        x = self.model.hidden(input_ids, places, documents)
        found = []
        for end, (_, more) in zip(documents.cu_seqlens[1:].tolist(), pairs, strict=True):
            log_p = self.model.project(x[end - len(more) : end]).float().log_softmax(-1)  # [len(more), V]
            wanted = torch.tensor(more, device=log_p.device)
            found.append((_sum(log_p, wanted), bool((log_p.argmax(-1) == wanted).all())))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that touch, each token scored once.

        A later window begins with a token of the text, not with BOS.
        """
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        scores = iter(self._scored([window for of_one in windows for window in of_one], disable_tqdm))
        return [sum(next(scores)[0] for _ in of_one) for of_one in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where a request says so; cut at the first of its stops."""
        found = []
        with progress_bar("writing", on=not disable_tqdm) as step:
            for done, request in enumerate(requests, 1):
                context, how = request.args
                found.append(self._answer(context, dict(how)))
                self.cache_hook.add_partial("generate_until", request.args, found[-1])
                step(done, len(requests))
        return found

    def _answer(self, context: str, how: dict[str, Any]) -> str:
        stops = how.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        most = int(how.get("max_gen_toks", self.max_gen_toks))
        room = max(1, self.max_length - most)
        prompt = [self.prefix_token_id, *self.tok_encode(context)[-(room - 1) :]] if room > 1 else []
        temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
        [ids] = generate(
            self.model, [prompt or [self.prefix_token_id]], max_new_tokens=most, temperature=temperature,
            eos_id=self.special.eos,
        )  # fmt: skip
        text = text_of(ids, self.bigtfm_tokenizer)
        for stop in filter(None, stops):
            text = text.partition(stop)[0]
        return text


def _sum(log_p: Tensor, wanted: Tensor) -> float:
    return float(log_p.gather(1, wanted[:, None]).double().sum())


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command, which now knows this model; ends the process as it does."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
