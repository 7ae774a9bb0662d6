"""From a config to the module of its family."""

from __future__ import annotations

from typing import Any

from bigtfm.config.sections import ModelSection
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {"gpt": GPT, "bert": BERT, "encoder_decoder": EncoderDecoder}


def make_model(config: ModelSection, vocab_size: int, **kwargs: Any) -> LanguageModel:
    """The module that config.family names, uninitialised; arguments as LanguageModel's."""
    return FAMILIES[config.family](config, vocab_size, **kwargs)
