"""What a rank holds of the fp32 weights and optimizer moments, by parameter name, in every ZeRO stage.

DeepSpeed keeps them elsewhere in each stage (whole tensors, flat partitions of a group, padded shards of a
parameter). Here they are all the same: a `Fragment` is a run of a parameter's elements inside a flat tensor
that the optimizer updates. A checkpoint made of fragments therefore knows of no stage and no world size.

ZeRO: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_STEP_IN_GROUP = {"FusedAdam", "FusedLamb", "FusedLion", "Lamb", "LARS", "Lion"}
_STEP_IN_STATE = {"DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion"}


@dataclass(frozen=True)
class Fragment:
    """Elements `start .. start + numel` of parameter `name`, which stand at `offset` in `flat`."""

    name: str
    shape: tuple[int, ...]  # the whole parameter's
    start: int
    numel: int
    flat: torch.Tensor  # what the optimizer updates: a flat partition, or the parameter itself
    offset: int
    group: int | None  # index of the optimizer's param_group; None: a frozen parameter, in the model's dtype

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's elements [numel] of `flat`, or of a moment of `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def loss_scaler(engine: Any) -> Any | None:
    """What holds fp16's loss scale, elsewhere at stage 0 than from 1 on; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config


def owned_fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments that this rank keeps. At stage 0 every rank keeps all, below 3 all that is frozen.

    It is in memory only until the next one is asked for: with NVMe offload a group is swapped in and out.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}  # tied ones once
    optimizer = engine.optimizer
    yield from _frozen(engine)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage_3(optimizer, names)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _mapped(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    elif hasattr(optimizer, "bf16_groups"):
        yield from _mapped(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    elif hasattr(optimizer, "fp32_groups_flat"):
        yield from _flat(optimizer.fp16_groups, optimizer.fp32_groups_flat, names)
    else:
        yield from _whole(optimizer, names)


def written_fragments(engine: Any, rank: int, world_size: int) -> Iterator[Fragment]:
    """Those of `owned_fragments` that this rank writes: of what all ranks have, its share."""
    stage, seen = engine.zero_optimization_stage(), 0
    total = sum(p.numel() for p in engine.module.parameters() if not (stage and p.requires_grad))
    for fragment in owned_fragments(engine):
        if stage == 3 or (stage and fragment.group is not None):
            yield fragment
            continue
        if seen * world_size // total == rank:
            yield fragment
        seen += fragment.numel


def _frozen(engine: Any) -> Iterator[Fragment]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if not hasattr(parameter, "ds_tensor"):
            yield Fragment(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, None)
            continue
        part = parameter.ds_tensor
        start = part.ds_numel * engine.optimizer._get_param_partition_rank(parameter)
        numel = min(part.ds_numel, parameter.ds_numel - start)
        if numel > 0:
            yield Fragment(name, tuple(parameter.ds_shape), start, numel, part, 0, None)


def _stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for index, group in enumerate(optimizer.fp16_groups):
        with _in_memory(optimizer, index):
            for parameter in group:
                _, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = padded * optimizer._get_param_partition_rank(parameter)
                numel = min(padded, parameter.ds_numel - start)  # the last ranks' shards end in padding
                if numel > 0:
                    flat, shape = optimizer.fp32_partitioned_groups_flat[index], tuple(parameter.ds_shape)
                    place = optimizer.sub_group_to_group_id[index]
                    yield Fragment(names[id(parameter)], shape, start, numel, flat, offset, place)


@contextmanager
def _in_memory(optimizer: Any, index: int) -> Iterator[None]:
    """A stage-3 group of weights and moments, fetched from NVMe if that is where it lives."""
    if not optimizer._swappable_optimizer_subgroup(index):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(index)


def _mapped(groups: list[Any], flats: list[torch.Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset, shape = mapping.hp_fragment_address.start, tuple(parameter.shape)
                yield Fragment(names[id(parameter)], shape, start, numel, flat, offset, index)


def _flat(groups: list[Any], flats: list[torch.Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        offset = 0
        for parameter in group:
            numel = parameter.numel()
            yield Fragment(names[id(parameter)], tuple(parameter.shape), 0, numel, flat, offset, index)
            offset += numel


def _whole(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for index, group in enumerate(optimizer.param_groups):
        low_precision = optimizer.fp16_groups[index] if hasattr(optimizer, "fp16_groups") else group["params"]
        for parameter, master in zip(low_precision, group["params"], strict=True):
            yield Fragment(names[id(parameter)], tuple(parameter.shape), 0, master.numel(), master, 0, index)


def moments(engine: Any, fragment: Fragment) -> dict[str, torch.Tensor]:
    """Views of the fragment's fp32 weights and of every optimizer moment, each [numel]."""
    state = base_optimizer(engine).state.get(fragment.flat, {})
    tensors = {"fp32": fragment.view(fragment.flat)}
    for key, value in state.items():
        if torch.is_tensor(value) and value.dim() > 0 and value.numel() == fragment.flat.numel():
            tensors[key] = fragment.view(value)
    return tensors


def update_count(engine: Any, fragment: Fragment) -> float:
    """Updates that the optimizer counts for this fragment (for Adam's bias correction)."""
    if fragment.group is None:
        return 0.0
    optimizer = base_optimizer(engine)
    state, group = optimizer.state.get(fragment.flat, {}), optimizer.param_groups[fragment.group]
    return float(state.get("step", group.get("step", engine.global_steps - engine.skipped_steps)))


def restore_moment(engine: Any, fragment: Fragment, key: str) -> torch.Tensor:
    """A view [numel] to be filled with the saved values of `key`; a moment that is missing yet is made."""
    if key == "fp32":
        return fragment.view(fragment.flat)
    state = base_optimizer(engine).state[fragment.flat]
    if key not in state:
        state[key] = torch.zeros_like(fragment.flat, memory_format=torch.preserve_format).detach()
    return fragment.view(state[key])


def restore_update_count(engine: Any, fragment: Fragment, count: float) -> None:
    """Sets the optimizer's own count where this kind of optimizer keeps it."""
    assert fragment.group is not None, "what is frozen is not updated"
    optimizer = base_optimizer(engine)
    keeper = (
        getattr(optimizer, "aux_optimizer", None) or optimizer
    )  # Muon leaves embeddings and vectors to an Adam
    kind, state = type(keeper).__name__, optimizer.state[fragment.flat]
    if kind in _STEP_IN_GROUP:
        optimizer.param_groups[fragment.group]["step"] = int(count)
    elif kind in _STEP_IN_STATE:
        state["step"] = int(count)
    elif isinstance(keeper, torch.optim.Adam | torch.optim.AdamW | torch.optim.Adagrad):
        state["step"] = torch.tensor(float(count))


def weights_follow_masters(engine: Any) -> None:
    """Copies the fp32 masters into the weights that the model computes with."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # the views of the moments are made anew
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    with torch.no_grad():
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            for index in range(len(optimizer.fp16_groups)):
                with _in_memory(optimizer, index):
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                first = optimizer.persistent_parameters[0]
                first.partition(optimizer.persistent_parameters)
                first.all_gather(optimizer.persistent_parameters)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups_flat"):
            for low, flat in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
                low.copy_(flat)
        elif hasattr(optimizer, "fp32_groups"):
            for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for low, master in zip(lows, masters, strict=True):
                    low.copy_(master)
