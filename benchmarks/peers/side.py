"""One side in its own process: `python -m peers.side NAME WORKLOAD FOLDER READ WRITE` (file descriptors)."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from bigtfm.resilience.lifeline import die_with
from peers.turns import Enough, Turns
from peers.workload import WORKLOADS, Workload


def run(name: str, shape: Workload, folder: Path, turns: Turns) -> None:
    """Trains turn by turn. The digit behind a name is its ZeRO stage."""
    kind, _, stage = name.rpartition("-")
    if name == "bare":
        from peers import bare

        bare.run(shape, folder, turns)
    elif name == "litgpt":
        from peers import litgpt_model

        litgpt_model.run(shape, folder, turns)
    elif name == "hf" or kind == "hf-deepspeed":
        from peers import hugging_face

        hugging_face.run(shape, folder, turns, int(stage) if kind else None)
    elif name == "matmul":
        products(turns)
    else:
        from peers import ours

        if name == "plain":
            ours.run_plainly(shape, folder, turns)
        else:
            assert kind == "bigtfm", f"no side is called {name}"
            ours.run(shape, folder, turns, int(stage))


def products(turns: Turns) -> None:
    """The ceiling: the fastest matrix product there is, measured anew in each turn."""
    import torch

    from bigtfm.bench.ceiling import matmul_flops

    turns.step()
    while True:
        turns.notes["flops"] = matmul_flops(torch.device("cpu"), "fp32", lambda: None)
        turns.step()


def main() -> None:
    name, shape, folder, read, write = sys.argv[1:]
    die_with(os.getppid())
    turns = Turns(os.fdopen(int(read)), os.fdopen(int(write), "w"))
    with suppress(Enough):
        run(name, WORKLOADS[shape], Path(folder), turns)


if __name__ == "__main__":
    main()
