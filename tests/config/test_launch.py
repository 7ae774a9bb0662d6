"""The launcher's variables."""

from __future__ import annotations

import pickle

import pytest

from bigtfm.config.launch import PORTS, Launch, hosts, of_srun, tasks_per_node
from bigtfm.config.problems import ConfigProblem, NoCheckpoint

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_no_variable_is_a_single_process() -> None:
    assert Launch.from_environment({}) == Launch(0, 1, 0, 1)


def test_a_rank_is_read() -> None:
    assert Launch.from_environment(TWO) == Launch(1, 2, 1, 2)
    assert Launch.from_environment(TWO | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == Launch(1, 2, 0, 1)


def test_the_flag_of_the_deepspeed_launcher_stands_in_for_the_variable() -> None:
    without = {name: value for name, value in TWO.items() if name != "LOCAL_RANK"}
    assert Launch.from_environment(without, local_rank=1) == Launch(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK -1"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 of 2"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, str | None], fragment: str) -> None:
    environ = {name: value for name, value in (TWO | changes).items() if value is not None}
    with pytest.raises(ConfigProblem) as caught:
        Launch.from_environment(environ)
    assert fragment in caught.value.line
    assert "\n" not in caught.value.line


def test_a_problem_crosses_from_rank_to_rank_whole() -> None:
    problem = NoCheckpoint("none verifies", where="runs/x", fix="restore one")
    copy = pickle.loads(pickle.dumps(problem))
    assert (copy.line, copy.exit_code) == (problem.line, 76)


SRUN = {  # of task 3 of 4 on two nodes of two GPUs, as srun 22.05 sets it
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_GPUS_ON_NODE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
}


def test_a_task_of_srun_is_a_rank() -> None:
    found = of_srun(SRUN)
    assert Launch.from_environment(found) == Launch(3, 4, 1, 2)
    assert found["MASTER_ADDR"] == "gpu08"
    assert int(found["MASTER_PORT"]) in PORTS


def test_all_tasks_agree_on_the_rendezvous_and_neighbours_have_another() -> None:
    def place(**changes: str) -> tuple[str, str]:
        found = of_srun(SRUN | {f"SLURM_{name}": value for name, value in changes.items()})
        return found["MASTER_ADDR"], found["MASTER_PORT"]

    assert place() == place(PROCID="0", LOCALID="0", NODEID="0")
    others = [place(JOB_ID="4712"), place(STEP_ID="1"), place(RESTART_COUNT="1"), place(RESTART_COUNT="2")]
    assert len({place(), *others}) == 5


def test_another_launcher_below_srun_goes_first() -> None:
    assert of_srun(SRUN | TWO) == {}
    assert of_srun({}) == {}
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert of_srun(batch) == {}, "a batch script is no task of srun, though it has SLURM_PROCID"


def test_an_address_or_port_that_is_set_is_taken() -> None:
    found = of_srun(SRUN | {"MASTER_ADDR": "10.0.0.8", "MASTER_PORT": "29501"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.8", "29501")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"WORLD_SIZE": "16"},
            "error: environment: WORLD_SIZE=16 is set, and srun has made it 4. Fix: unset WORLD_SIZE in the "
            "batch script, or set RANK, too, in every task",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2"},
            "error: Slurm: this node has 8 of the job's GPUs, and srun has started 1 task on it: a rank "
            "needs one each. Fix: ask for --gpus-per-node=8 with --ntasks-per-node=8",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "0"},
            "error: Slurm: 2 tasks on this node, and each sees 1 GPU: NCCL reaches a neighbour's memory only "
            "where it sees its GPU. Fix: ask for --gpus-per-node=2 instead of --gpus-per-task, without "
            "--gpu-bind",
        ),
    ],
)
def test_a_step_that_can_not_train_is_told_why(changes: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        of_srun(SRUN | changes)
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("login", "login"),
        ("n[1-3,07-09],login2", "n1 n2 n3 n07 n08 n09 login2"),
        ("a[1-2]b[3,5]-x,c", "a1b3-x a1b5-x a2b3-x a2b5-x c"),
        ("rack-1,rack[099-101]", "rack-1 rack099 rack100 rack101"),
    ],
)
def test_node_lists_are_spelled_out_as_scontrol_does(short: str, names: str) -> None:
    assert list(hosts(short)) == names.split()


def test_counts_of_nodes_are_spelled_out() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
