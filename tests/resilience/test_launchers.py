"""Which command lines are a launcher's."""

from __future__ import annotations

import pytest

from bigtfm.resilience.launchers import launcher_in


@pytest.mark.parametrize(
    ("line", "launcher"),
    [
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launch/train.py", "deepspeed"),
        ("/bin/sh /usr/bin/ds --num_gpus 2", "ds"),
        ("python3.11 -u -m deepspeed.launcher.launch --world_info=e30=", "deepspeed.launcher.launch"),
        ("python -m torch.distributed.run --nproc-per-node 2 x.py", "torch.distributed.run"),
        ("torchrun --nproc-per-node 2 x.py", "torchrun"),
        ("bash start.sh ds", None),
        ("bash -c deepspeed_and_more", None),
        ("make deepspeed", None),
        ("sudo -u deepspeed bash", None),
        ("tmux new -s ds", None),
        ("python train.py deepspeed", None),
        ("-bash", None),
        ("bash", None),
        ("", None),
    ],
)
def test_a_launcher_is_the_program_or_its_script(line: str, launcher: str | None) -> None:
    assert launcher_in(line.split(" ")) == launcher
