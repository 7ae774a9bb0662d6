"""A checkpoint of DeepSpeed's own, of any ZeRO stage and number of ranks, by parameter name.

Nothing is put together before it is asked for: files are mapped, and one tensor at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.engine.checkpoint import COUNTERS
from bigtfm.engine.deepspeed_files import bad, newest, state_files, unpickled

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Elements `start .. start + numel` of a parameter, which stand at `offset` in each of `tensors`."""

    start: int
    numel: int
    offset: int
    tensors: Mapping[str, Tensor]  # "fp32" and the optimizer's moments
    updates: float  # that the optimizer counts, for Adam's bias correction


@dataclass(frozen=True)
class Saved:
    """A checkpoint: where every parameter's weights and moments are, and what is no tensor."""

    folder: Path
    stage: int
    world_size: int
    state: Mapping[str, Any]  # of the model states' file: counters, lr_scheduler, ds_config ...
    shapes: Mapping[str, Shape]
    pieces: Mapping[str, Sequence[Piece]]
    group_of: Mapping[str, int]  # a trained parameter's place in `groups`; the others were frozen
    groups: Sequence[Mapping[str, Any]]  # the optimizer's: lr, weight_decay ...; empty where not saved
    loss_scaler: Mapping[str, Any]

    @property
    def moments(self) -> list[str]:
        """Names of the optimizer's moments; none before its first update."""
        return sorted({key for name in self.group_of for key in self.pieces[name][0].tensors} - {"fp32"})

    @property
    def updates(self) -> float:
        """Updates that the optimizer has counted."""
        return max(piece.updates for pieces in self.pieces.values() for piece in pieces)

    def read(self, name: str, key: str) -> Tensor:
        """A parameter's fp32 weights or one of its moments, whole; what was frozen has moments of 0."""
        whole = torch.zeros(math.prod(self.shapes[name]))
        for piece in self.pieces[name]:
            if key in piece.tensors:
                values = piece.tensors[key].view(-1)[piece.offset : piece.offset + piece.numel]
                whole[piece.start : piece.start + piece.numel].copy_(values)
        return whole.view(self.shapes[name])


def open_checkpoint(path: Path, *, trust: bool = False) -> Saved:
    """Finds out where everything is; no tensor is copied.

    path: what was given to save_checkpoint, or one of its folders. trust: unpickle whatever the files hold.

    Raises:
        NoCheckpoint: it is missing, incomplete, damaged, of another parallelism, or needs trust.
    """
    folder = newest(path)
    models, optims = state_files(folder)
    state = unpickled(models[0], trust)
    try:
        if any(type(state[name]) is not int or state[name] < 0 for name in COUNTERS):
            raise ValueError("a count of steps or samples is none")
        if not optims:
            return _stage_0(folder, state)
        ranks = [unpickled(file, trust)["optimizer_state_dict"] for file in optims]
        counts = [_count(rank) for rank in ranks]
        if set(counts) != {len(ranks)}:
            raise bad(f"{len(ranks)} ranks' optim_states are there, of {max(counts)} that wrote", folder)
        stage = int(ranks[0].get("zero_stage", 1))
        if stage == 3 and len(models) != len(ranks):
            raise bad(f"{len(models)} ranks' model_states are there, of {len(ranks)} that wrote", folder)
        others = [unpickled(file, trust) for file in models[1:]] if state.get("frozen_param_shapes") else []
        return _sharded(folder, stage, [state, *others], ranks)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise bad(f"not as DeepSpeed writes it: {type(error).__name__}: {error}", folder) from None


def _count(rank: Mapping[str, Any]) -> int:
    """Ranks among which a rank's file says that everything was cut."""
    count = rank["partition_count"]
    return int(max(count) if isinstance(count, list) else count)


def _sharded(folder: Path, stage: int, states: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> Saved:
    """Stages 1 to 3, BF16_Optimizer among them."""
    state, pieces = states[0], dict[str, list[Piece]]()
    shapes = {name: tuple(shape) for part in state["param_shapes"] for name, shape in part.items()}
    for rank in ranks:
        for name, piece in (_stage_3 if stage == 3 else _stage_1_2)(rank, state, len(ranks)):
            before = pieces.setdefault(name, [])
            start = before[-1].start + before[-1].numel if before else 0  # a parameter is cut in rank order
            numel = min(piece.numel, math.prod(shapes[name]) - start)  # at stage 3 they end in padding
            before.append(replace(piece, start=start, numel=numel))
    groups = _optimizer_state(ranks[0], stage).get("param_groups", [])
    places = [place for place, group in enumerate(groups) for _ in group["params"]]  # stage 3: of sub-groups
    group_of = {
        name: places[number] if places else 0
        for number, part in enumerate(state["param_shapes"])
        for name in part
    }
    for name, shape, parts in _frozen(states, stage, shapes):
        shapes[name], pieces[name] = shape, parts
    scaler = ranks[0].get("loss_scaler")
    scaling = vars(scaler) if scaler is not None else {}
    saved = Saved(folder, stage, len(ranks), state, shapes, pieces, group_of, groups, scaling)
    _require_covered(saved)
    return saved


def _optimizer_state(rank: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """torch's state dict of the optimizer; an elastic checkpoint has a list of states alone."""
    found = rank["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    return found if isinstance(found, dict) else {"state": dict(enumerate(found))}


def _stage_1_2(rank: dict[str, Any], state: dict[str, Any], _: int) -> Iterator[tuple[str, Piece]]:
    """Each group is one flat tensor, cut among the ranks."""
    optimizer, flats = _optimizer_state(rank, 1), rank["single_partition_of_fp32_groups"]
    for number, (flat, places) in enumerate(zip(flats, rank["param_slice_mappings"], strict=True)):
        updates = rank.get("base_optimizer_state_step", _applied(state))
        tensors, updates = _tensors(flat, optimizer, number, updates)
        for name, place in places.items():
            yield name, Piece(0, place.numel, place.start, tensors, updates)


def _stage_3(rank: dict[str, Any], state: dict[str, Any], count: int) -> Iterator[tuple[str, Piece]]:
    """Each sub-group is one flat tensor: this rank's part of each of its parameters, one after another."""
    optimizer, flats = _optimizer_state(rank, 3), rank["fp32_flat_groups"]
    for number, (flat, shapes) in enumerate(zip(flats, state["param_shapes"], strict=True)):
        tensors, updates = _tensors(flat, optimizer, number, _applied(state))
        offset = 0
        for name, shape in shapes.items():
            part = -(-math.prod(shape) // count)
            yield name, Piece(0, part, offset, tensors, updates)
            offset += part


def _frozen(
    states: list[dict[str, Any]], stage: int, trained: Mapping[str, Shape]
) -> list[tuple[str, Shape, list[Piece]]]:
    """Parameters that no optimizer held."""
    state, found = states[0], []
    if stage == 3:
        for name, shape in (state.get("frozen_param_shapes") or {}).items():
            part, numel = -(-math.prod(shape) // len(states)), math.prod(shape)
            parts = [
                Piece(start, min(part, numel - start), 0, {"fp32": each["frozen_param_fragments"][name]}, 0.0)
                for each, start in zip(states, range(0, numel, part), strict=False)
            ]
            found.append((name, tuple(shape), parts))
        return found
    held = {*trained, *(state.get("buffer_names") or ()), *(state.get("shared_params") or ())}
    for name, values in state["module"].items():
        if name not in held:
            found.append((name, tuple(values.shape), [Piece(0, values.numel(), 0, {"fp32": values}, 0.0)]))
    return found


def _stage_0(folder: Path, state: dict[str, Any]) -> Saved:
    """One optimizer of whole tensors, numbered group after group and not named."""
    optimizer, buffers = state["optimizer"], state.get("buffer_names") or ()
    if optimizer is None:
        raise bad("no optimizer_states here: weights without a training", folder)
    module = {name: values for name, values in state["module"].items() if name not in buffers}
    groups = optimizer.get("optimizer_state_dict", optimizer)["param_groups"]
    fitting = [
        (names, pieces)
        for names in _groupings(module, groups)
        if (pieces := _pieces_of(names, module, optimizer, state)) is not None
    ]
    if len(fitting) != 1:
        raise bad(
            "it can't be told which of the optimizer's states belongs to which parameter",
            folder,
            "save it at ZeRO stage 1, where DeepSpeed notes the names",
        )
    names, pieces = fitting[0]
    group_of = {name: number for number, group in enumerate(names) for name in group}
    shapes = {name: tuple(values.shape) for name, values in module.items()}
    return Saved(folder, 0, int(state["dp_world_size"]), state, shapes, pieces, group_of, groups, optimizer)


def _groupings(module: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Ways to spread the parameters over the groups: as noted, all in one, or matrices and vectors apart."""
    if all("param_names" in group for group in groups):
        return [[list(group["param_names"]) for group in groups]]
    if len(groups) != 2:
        return [[list(module)]]
    matrices = [name for name, values in module.items() if values.dim() >= 2]
    vectors = [name for name, values in module.items() if values.dim() < 2]
    return [[matrices, vectors], [vectors, matrices]]


def _pieces_of(
    names: list[list[str]], module: Mapping[str, Tensor], optimizer: Mapping[str, Any], state: dict[str, Any]
) -> dict[str, list[Piece]] | None:
    """The pieces if the parameters are spread so; None if the tensors are not of these shapes or values."""
    inner, flats, masters = (
        optimizer.get("optimizer_state_dict", optimizer),
        optimizer.get("fp32_groups_flat"),
        optimizer.get("fp32_groups"),
    )
    pieces: dict[str, list[Piece]] = {}
    number = 0  # of the optimizer's tensor
    for place, group in enumerate(names):
        offset = 0
        for turn, name in enumerate(group):
            values = module[name]
            if flats is not None:
                weights, number = flats[place], place
            else:
                weights = (
                    masters[place][turn] if masters is not None and turn < len(masters[place]) else values
                )
            tensors, updates = _tensors(weights, inner, number, _applied(state))
            numel = values.numel()
            if flats is None and any(tensor.shape != values.shape for tensor in tensors.values()):
                return None
            low = weights.reshape(-1)[offset : offset + numel].to(values.dtype)
            if weights is not values and not torch.equal(low, values.reshape(-1)):
                return None
            pieces[name] = [Piece(0, numel, offset, tensors, updates)]
            offset, number = (offset + numel, number) if flats is not None else (0, number + 1)
    sizes = [len(group["params"]) for group in inner["param_groups"]]
    whole = flats is not None or sizes == [len(group) for group in names]
    return pieces if whole and pieces.keys() == module.keys() else None


def _tensors(
    flat: Tensor, optimizer: Mapping[str, Any], number: int, applied: float
) -> tuple[dict[str, Tensor], float]:
    """The weights in `flat` with their moments, which stand in the same places, and their updates."""
    kept = optimizer["state"].get(number, {})
    groups: list[dict[str, Any]] = optimizer.get("param_groups", [])
    counts = [group["step"] for group in groups if number in group["params"] and "step" in group]
    moments = {k: v for k, v in kept.items() if torch.is_tensor(v) and v.dim() > 0 and k != "step"}
    return {"fp32": flat, **moments}, float(kept.get("step", [*counts, applied][0]))


def _applied(state: Mapping[str, Any]) -> float:
    return float(state["global_steps"] - state["skipped_steps"])


def _require_covered(saved: Saved) -> None:
    """Every element of every parameter is there once, with its moments, and all are of one step."""
    counted = {piece.updates for name in saved.group_of for piece in saved.pieces[name]}
    if len(counted) > 1:
        raise bad(
            f"the ranks' files are of {len(counted)} steps: after {sorted(counted)} updates", saved.folder
        )
    for name, shape in saved.shapes.items():
        pieces = saved.pieces.get(name, [])
        keys = pieces[0].tensors.keys() if pieces else {}
        if sum(piece.numel for piece in pieces) != math.prod(shape):
            raise bad(f"the ranks' files do not hold all of {name}", saved.folder)
        for piece in pieces:
            held = min(tensor.numel() for tensor in piece.tensors.values())
            if piece.offset + piece.numel > held or piece.tensors.keys() != keys:
                what = f"weights and moments of {name} are not of one size"
                raise bad(what, saved.folder, "what is offloaded to NVMe, and Muon's, can't be imported")
