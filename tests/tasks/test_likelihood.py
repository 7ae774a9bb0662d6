"""What is foretold of examples is the loss that training has of them; masks are the same for any rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bigtfm.config.run import load_run_config
from bigtfm.data.examples import Example, Reader
from bigtfm.data.samples import Samples
from bigtfm.data.special import SpecialIds, special_ids
from bigtfm.data.supervised import completion, sequence_to_sequence
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer
from bigtfm.generation.decoding import pack
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import init_weights
from bigtfm.tasks import likelihood, masked
from bigtfm.tasks.known import TASKS
from bigtfm.tasks.predictor import Predictor

SHAPE = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "model.init_std=0.3",
         "model.max_seq_len=32"]  # fmt: skip
ROWS = [{"source": "The state of the union is strong.", "target": "Strong."},
        {"source": "We", "target": "My fellow citizens of America"}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return load_tokenizer(tiny_data / "tokenizer")


def made(
    family: str, kind: str, tokenizer: Tokenizer, batch_tokens: int
) -> tuple[LanguageModel, SpecialIds, Predictor]:
    run = load_run_config(
        None, [*SHAPE, f"model.family={family}", f"objective.kind={kind}", "data.packing=best_fit"]
    )
    special = special_ids(tokenizer, run)
    kinds = {"gpt": GPT, "bert": BERT, "encoder_decoder": EncoderDecoder}
    model = kinds[family](run.model, special.vocab_size, objective=run.objective)
    init_weights(model)
    return model, special, Predictor(model.eval(), special, batch_tokens)


def samples_of(one: Example) -> Samples:
    ends = np.array([len(one.ids)])
    ids, marks = np.array(one.ids), np.array(one.marks)
    return Samples(
        ids, ids, np.array([0, *ends]), ends, ends, ends, ends, 32, 32, lambda a, b: ids[a:b], marks
    )


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_a_decoder_is_asked_as_it_was_trained(batch_tokens: int, tokenizer: Tokenizer) -> None:
    model, _, predictor = made("gpt", "completion", tokenizer, batch_tokens)
    examples = [TASKS["translation"].format.make(row, Reader(tokenizer, 32))[0] for row in ROWS]
    for one, found, row in zip(
        examples, likelihood.of_written(predictor, examples, tokenizer), ROWS, strict=True
    ):
        learnt = completion(samples_of(one))
        ids, places, _, documents = pack([one.ids], torch.device("cpu"))
        loss, count = model(
            ids, torch.from_numpy(learnt.labels), places, documents.cu_seqlens, (len(one.ids),)
        )
        assert found.loss == pytest.approx(loss.item(), rel=1e-5)
        assert (len(found.ids), found.size) == (count, len(row["target"]))
        assert tokenizer.decode(found.ids) == row["target"]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_an_encoder_decoder_is_asked_as_it_was_trained(batch_tokens: int, tokenizer: Tokenizer) -> None:
    model, special, predictor = made("encoder_decoder", "sequence_to_sequence", tokenizer, batch_tokens)
    examples = [TASKS["translation"].format.make(row, Reader(tokenizer, 32))[0] for row in ROWS]
    for one, found in zip(examples, likelihood.of_written(predictor, examples, tokenizer), strict=True):
        learnt = sequence_to_sequence(samples_of(one), special=special)
        assert learnt.decoder_input_ids is not None
        read, places, _, source = pack([learnt.input_ids.tolist()], torch.device("cpu"))
        begun, at, _, target = pack([learnt.decoder_input_ids.tolist()], torch.device("cpu"))
        loss, count = model(
            read, places, source.cu_seqlens, source.seq_lens, begun, torch.from_numpy(learnt.labels), at,
            target.cu_seqlens, target.seq_lens,
        )  # fmt: skip
        assert found.loss == pytest.approx(loss.item(), rel=1e-5)
        assert len(found.ids) == count


def test_what_is_masked_does_not_depend_on_who_looks(tokenizer: Tokenizer) -> None:
    _, _, predictor = made("bert", "masked_lm", tokenizer, 64)
    texts = [b"My fellow citizens, the state of the union is strong. " * n for n in (1, 9, 2)]
    whole = masked.foretold(predictor, texts, range(3), tokenizer)
    [last] = masked.foretold(predictor, texts[2:], [2], tokenizer)
    assert last.loss == pytest.approx(whole[2].loss, rel=1e-5)
    assert last.ids.tolist() == whole[2].ids.tolist()
    [elsewhere] = masked.foretold(predictor, texts[2:], [5], tokenizer)
    assert elsewhere.ids.tolist() != last.ids.tolist(), "each text has masks of its own"
    share = len(whole[1].ids) / len(tokenizer.encode(texts[1]))
    assert 0.08 < share < 0.25, "0.15, about"
    assert whole[1].loss / len(whole[1].ids) > 3, "it has learnt nothing, and does not see what is hidden"
