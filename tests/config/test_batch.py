"""The global batch as a function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.config.batch import GlobalBatch, global_batch
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config
from bigtfm.config.sections import BatchSection

RAMP = GlobalBatch(32, (8, 16), (3, 2))


def test_a_ramp_up_by_hand() -> None:
    assert [RAMP.at(step) for step in range(1, 8)] == [8, 8, 8, 16, 16, 32, 32]
    assert [RAMP.samples(steps) for steps in range(8)] == [0, 8, 16, 24, 40, 56, 88, 120]
    assert RAMP.parts(7) == [(8, 3), (16, 2), (32, 2)]
    assert RAMP.parts(2) == [(8, 2)]
    assert RAMP.steps_left(3, 7) == (120 - 24) / 8
    assert GlobalBatch(8).steps_left(3, 7) == 4


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4),
    st.integers(1, 20),
    st.integers(0, 150),
)
def test_its_sums_are_those_of_its_steps(stages: list[tuple[int, int]], final: int, samples: int) -> None:
    batch = GlobalBatch(final, tuple(size for size, _ in stages), tuple(count for _, count in stages))
    steps, taken = 0, 0
    while taken + batch.at(steps + 1) <= samples:
        steps += 1
        taken += batch.at(steps)
        assert batch.samples(steps) == taken
    assert batch.steps_within(samples) == steps


def test_without_a_ramp_up_it_is_the_json_s() -> None:
    assert global_batch(BatchSection(), 12, 2, 2) == GlobalBatch(12)


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "ranks", "said", "fix"),
    [
        ((8, 20), 4, 2, "has 20, which is not a multiple of 8 = 4 micro batch x 2 ranks", "16 or 24"),
        (
            (4,),
            8,
            1,
            "has 4, which is not a multiple of 8",
            "write 8, or set train_micro_batch_size_per_gpu to 4 in",
        ),
        ((8, 32), 4, 2, "ends with 32, and train_batch_size, that it leads up to, is 32", "leave out"),
    ],
)
def test_sizes_that_a_layout_cannot_make_are_refused(
    sizes: tuple[int, ...], micro_batch: int, ranks: int, said: str, fix: str
) -> None:
    section = BatchSection(rampup_sizes=sizes, rampup_steps=(1,) * len(sizes))
    with pytest.raises(ConfigProblem) as refused:
        global_batch(section, 32, micro_batch, ranks)
    assert said in refused.value.what
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rampup_sizes=8,16", "rampup_steps=10"], "2 entries and batch.rampup_steps 1"),
        (["rampup_sizes=16,8", "rampup_steps=10,10"], "must grow"),
        (["rampup_sizes=8,8", "rampup_steps=10,10"], "must grow"),
        (["rampup_sizes=0", "rampup_steps=10"], "greater than or equal to 1"),
    ],
)
def test_stages_that_do_not_fit_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigProblem) as refused:
        load_run_config(None, overrides)
    assert said in str(refused.value)


def test_one_stage_needs_no_brackets_on_the_command_line() -> None:
    run = load_run_config(None, ["rampup_sizes=8", "rampup_steps=100"])
    assert (run.batch.rampup_sizes, run.batch.rampup_steps) == ((8,), (100,))
