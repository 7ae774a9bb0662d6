"""Devices, communication and time of a step, against numbers computed by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from gpt2 import GPT2, ON_H100

from bigtfm.config.problems import ConfigProblem
from bigtfm.planner.communication import plan_communication
from bigtfm.planner.hardware import DEVICES, NAMES, device_of, names_like
from bigtfm.planner.setting import Setting
from bigtfm.planner.step_time import EFFICIENCY, LIMITED, Rates, plan_step, table_rates, work_of

COUNT = 124_439_808  # GPT-2's parameters
HEAD = 768 * 50257
MEASURED = {"source": "a test", "device": "NVIDIA H100 80GB HBM3", "precision": "bf16", "ranks": 2}
BLOCKS = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)


def test_every_device_is_found_by_its_names() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for device in DEVICES:
        assert device_of(device.name) is device
    names = {
        "NVIDIA H100 80GB HBM3": "h100-80g",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100-40g",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA A100 80GB PCIe": "a100-pcie-80g",
        "Tesla V100-SXM2-32GB": "v100-32g",
        "NVIDIA L40S": "l40s",
    }
    for name, wanted in names.items():
        found = device_of(name)
        assert found is not None
        assert found.name == wanted
    assert device_of("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert device_of("h100") is None
    assert "h100-80g" in names_like("h100")
    assert names_like("h100-80") == "did you mean h100-80g?"
    assert names_like("x").startswith("use one of: a10,")


def test_a_data_sheet_s_numbers() -> None:
    h100 = device_of("h100-80g")
    assert h100 is not None
    assert (h100.memory, h100.bandwidth, h100.link, h100.network, h100.power) == (
        int(79.1 * 2**30), 3.35e12, 450e9, 50e9, 700,
    )  # fmt: skip


def test_what_is_sent_by_hand() -> None:
    """2 bytes a parameter on 8 ranks: an all-reduce sends 2 x 7/8 of them, a gather or a scatter 7/8."""
    once = COUNT * 2 * 7 / 8
    sent = {
        stage: plan_communication(replace(ON_H100, zero={"stage": stage}, accumulation=4), 8)
        for stage in range(4)
    }
    assert sent[0].sent == sent[0].all_reduce == round(2 * once)
    assert (sent[1].all_reduce, sent[1].all_gather) == (round(2 * once), round(once))
    assert (sent[2].all_reduce, sent[2].all_gather) == (round(8 * once), round(once))
    assert (sent[3].all_gather, sent[3].reduce_scatter) == (round(4 * once), round(4 * once))
    assert sent[3].between_nodes(8) == 0


def test_stage_3_gathers_a_second_time_what_did_not_stay() -> None:
    """With a reuse distance of half of the model, a quarter of it stays from forward to backward."""
    zero = {"stage": 3, "stage3_max_reuse_distance": COUNT // 2}
    found = plan_communication(replace(ON_H100, zero=zero), 8)
    assert found.all_gather == pytest.approx(1.75 * COUNT * 2 * 7 / 8, rel=1e-6)


def test_a_ring_crosses_between_nodes_over_every_gpu_s_card() -> None:
    found = plan_communication(replace(ON_H100, world_size=16), 8)
    assert found.sent == round(2 * COUNT * 2 * 15 / 16)
    assert found.between_nodes(8) == round(found.sent / 8)
    alone = plan_communication(replace(ON_H100, world_size=1), 8)
    assert alone.sent == alone.calls == 0


def test_work_by_hand() -> None:
    tokens = 8 * 1024
    work = work_of(ON_H100)
    assert work.products == 6 * tokens * (BLOCKS + HEAD)
    # causal: half of 4 d T a token and block, forward; the backward of a fused kernel computes 2.5 times it
    assert work.attention == 3.5 * tokens * 12 * 4 * 768 * 1024 / 2
    assert work.update == COUNT * (16 + 16 + 4)
    assert work.logits == tokens * ON_H100.model.padded_vocab_size(ON_H100.vocab_size)
    assert work.gathered == 0
    third = work_of(replace(ON_H100, zero={"stage": 3}, accumulation=4))
    assert third.gathered == 4 * len(ON_H100.parameters)
    full = work_of(replace(ON_H100, recompute="full"))
    assert full.products - work.products == 2 * tokens * BLOCKS
    assert work_of(replace(ON_H100, recompute=2)).products - work.products == tokens * BLOCKS
    assert work_of(replace(ON_H100, zero={"stage": 1})).update == work.update / 8
    assert work_of(replace(ON_H100, accumulation=4)).products == 4 * work.products


def test_a_step_is_its_parts() -> None:
    """Rates of one second for a unit of one kind give that kind's work."""
    none = dict.fromkeys(vars(work_of(ON_H100)), 0.0)
    for kind, amount in vars(work_of(ON_H100)).items():
        rates = Rates(**(none | {"steps": 1.0, kind: 1.0}), **MEASURED)
        assert plan_step(ON_H100, rates).seconds == amount + (kind != "steps"), kind


def test_a_table_s_estimate_says_that_it_is_one() -> None:
    h100, t4 = device_of("h100-80g"), device_of("t4")
    assert h100 is not None
    assert t4 is not None
    rates = table_rates(h100, "bf16")
    assert rates is not None
    assert not rates.measured
    assert "estimated" in rates.source
    assert rates.products == 1 / (LIMITED["products"] * 989.4e12)
    a100 = device_of("a100-80g")
    assert a100 is not None
    slower = table_rates(a100, "bf16")
    assert slower is not None
    assert slower.products == 1 / (EFFICIENCY["products"] * 312e12)
    assert table_rates(t4, "bf16") is None


def test_more_ranks_are_faster_and_a_slower_network_is_seen() -> None:
    h100 = device_of("h100-80g")
    assert h100 is not None
    rates = table_rates(h100, "bf16")
    assert rates is not None
    speeds = [plan_step(replace(ON_H100, world_size=n), rates).tokens_per_second for n in (1, 8, 64)]
    assert speeds == sorted(speeds)
    assert speeds[1] < 8 * speeds[0]
    slow = replace(rates, between_nodes=1e-7)
    over = replace(ON_H100, world_size=64)
    assert plan_step(over, slow).split["communication"] > plan_step(over, rates).split["communication"]


def test_an_encoder_s_output_layer_is_asked_about_hidden_tokens() -> None:
    bert = GPT2.model_copy(update={"family": "bert"})
    work = work_of(replace(ON_H100, model=bert))
    rows = round(8 * 1024 * 0.15)
    assert work.products == 6 * (8 * 1024 * BLOCKS + rows * (HEAD + 768 * 768))


@pytest.fixture
def rates() -> Rates:
    return Rates(**dict.fromkeys(vars(work_of(ON_H100)), 1e-9), **MEASURED)


def test_rates_are_read_as_written(tmp_path: Path, rates: Rates) -> None:
    rates.write(tmp_path / "rates.json")
    assert Rates.read(tmp_path / "rates.json") == rates
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"products": "a"}, "products: Input should be a valid number"),
        ({"products": 0.0}, "products: Input should be greater than 0"),
        ({"sent": float("nan")}, "sent: Input should be a finite number"),
        ({"sent": -1.0}, "sent: Input should be greater than or equal to 0"),
        ({"colour": 1.0}, "colour: Unexpected keyword"),
        ({"source": None}, "source: Input should be a valid string"),
    ],
)
def test_a_file_that_holds_no_rates(tmp_path: Path, rates: Rates, change: dict, said: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(rates) | change))
    with pytest.raises(ConfigProblem, match=f"holds no calibration: {said}"):
        Rates.read(path)


@pytest.mark.parametrize("text", ["", '{"products": 1', "[]"])
def test_a_torn_file_of_rates(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ConfigProblem, match="holds no calibration"):
        Rates.read(tmp_path / "rates.json")


def test_rates_speak_for_their_own_hardware_alone(rates: Rates) -> None:
    rates.suit("h100-80g", "bf16")
    rates.suit("NVIDIA H100 80GB HBM3")
    for device, precision in (("cpu", "bf16"), ("h200", "bf16"), ("h100-80g", "fp16")):
        with pytest.raises(ConfigProblem, match="its rates are those of NVIDIA H100 80GB HBM3 in bf16, not"):
            rates.suit(device, precision)


def test_what_one_machine_does_not_show_is_not_free(rates: Rates) -> None:
    h100 = device_of("h100-80g")
    assert h100 is not None
    table = table_rates(h100, "bf16")
    assert table is not None
    unseen = replace(rates, between_nodes=0.0, moved=0.0, swapped=0.0)
    found = unseen.completed(table)
    assert (found.between_nodes, found.moved, found.swapped) == (
        table.between_nodes, table.moved, table.swapped,
    )  # fmt: skip
    assert (found.sent, found.products) == (rates.sent, rates.products)
    assert replace(unseen, ranks=1).completed(table).sent == table.sent


def test_a_disk_is_slower_than_the_host_s_memory() -> None:
    """Masters and moments are read and written, gradients too; weights read twice a micro batch."""

    def offloaded(where: str) -> Setting:
        zero = {"stage": 3, "offload_optimizer": {"device": where}, "offload_param": {"device": where}}
        return replace(ON_H100, zero=zero, accumulation=4)

    assert work_of(offloaded("cpu")).swapped == 0
    share = COUNT / 8
    assert work_of(offloaded("nvme")).swapped == 8 * (32 * share + 2 * (8 * share + share))
    h100 = device_of("h100-80g")
    assert h100 is not None
    rates = table_rates(h100, "bf16")
    assert rates is not None
    host, disk = (plan_step(offloaded(where), rates).split["offload"] for where in ("cpu", "nvme"))
    assert disk > 2 * host
