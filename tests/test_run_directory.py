"""What a run directory says of its run; an earlier version's goes on, with the defaults of later keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.job import check_job
from bigtfm.run_directory import lay_out, refuse_changes, saved_identity


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


@pytest.mark.parametrize(("key", "value", "offered"), [("activation", "gelu", True), ("head_dim", 8, False)])
def test_a_change_of_shape_is_not_offered_to_be_accepted(key: str, value: Any, offered: bool) -> None:
    with pytest.raises(ConfigProblem) as caught:
        refuse_changes(identity(), identity(**{key: value}), (), Path("run"))
    assert ("resume.allow=model" in caught.value.line) == offered


def test_a_run_keeps_the_files_that_it_was_started_with(
    deepspeed_json: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    """Also where another start has written the JSON anew since it was read."""
    path = deepspeed_json(stage=1)
    before = path.read_bytes()
    job = check_job(None, path, [*TINY, "steps=4", f"data.path={tiny_data}", f"run.dir={tmp_path}"], 1)
    deepspeed_json(stage=2)
    lay_out(job)
    assert (job.run.run_dir / "deepspeed.json").read_bytes() == before != path.read_bytes()
