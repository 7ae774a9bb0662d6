"""A run of an earlier version goes on: keys that it did not know yet have their defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.run_directory import refuse_changes, saved_identity


def identity(tune: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    return {
        "model": json.loads(ModelSection(**model).model_dump_json()) | {"vocab_size": 512},
        "objective": json.loads(ObjectiveSection(kind="causal_lm").model_dump_json()),
        "recipe": {"global_batch": 8, "tune": TuneSection(**(tune or {})).model_dump(mode="json")},
    }


def test_what_came_later_is_no_change_until_it_is_set() -> None:
    old = identity(hidden_size=96)
    for key in ("num_labels", "keep_zeros"):
        del old["model"][key]
    del old["objective"]["l1"]
    del old["recipe"]["tune"]
    saved = saved_identity({"progress": {"identity": old}})
    refuse_changes(saved, identity(hidden_size=96), (), Path("run"))
    with pytest.raises(ConfigProblem, match=r"model.keep_zeros was False .* and is True now"):
        refuse_changes(saved, identity(hidden_size=96, keep_zeros=True), (), Path("run"))
    with pytest.raises(ConfigProblem, match=r"recipe.tune.lora_rank was 0 .* and is 8 now"):
        refuse_changes(saved, identity(hidden_size=96, tune={"lora_rank": 8}), (), Path("run"))
    assert "num_labels" not in old["model"], "what was read stays as it is"
