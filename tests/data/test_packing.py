import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.config.problems import DataProblem
from bigtfm.data.packing import pad, unpad, unpad_pairs

IGNORE = -100


def padded(rows, slots, side):
    """Rows of ids as a padded batch: ids [B, S] (99 in padding) and attention mask."""
    ids = torch.full((len(rows), slots), 99)
    mask = torch.zeros(len(rows), slots, dtype=torch.int64)
    for n, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(slots - len(row), slots)
        ids[n, here], mask[n, here] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    spare=st.integers(0, 3),
    side=st.sampled_from(["left", "right"]),
)
def test_a_batch_comes_back(lengths, spare, side):
    rows = [[10 * n + i for i in range(length)] for n, length in enumerate(lengths)]
    ids, mask = padded(rows, max(lengths) + spare, side)
    packed = unpad(ids, mask, labels=ids + 1)
    full = [row for row in rows if row]
    assert packed["input_ids"].tolist() == [token for row in full for token in row]
    assert packed["labels"].tolist() == [token + 1 for row in full for token in row]
    assert packed["position_ids"].tolist() == [i for row in full for i in range(len(row))]
    assert packed["seq_lens"] == tuple(map(len, full))
    assert packed["cu_seqlens"].tolist() == [sum(map(len, full[:n])) for n in range(len(full) + 1)]
    assert packed["cu_seqlens"].dtype == torch.int32
    assert torch.equal(pad(packed["input_ids"], mask, fill=99), ids)
    features = torch.randn(len(packed["input_ids"]), 3)
    back = pad(features, mask)
    assert torch.equal(back[mask.bool()], features)
    assert not back[~mask.bool()].any()
    assert back.shape == (*mask.shape, 3)


def test_keys_go_on_with_the_rows():
    ids, mask = padded([[1, 2], [], [3]], 4, "right")
    whole = unpad(*padded([[1, 2], [], [3], [1, 2], [], [3]], 4, "right"))["token_keys"].tolist()
    parts = [unpad(ids, mask, first_row=row)["token_keys"].tolist() for row in (0, 3)]
    assert whole == parts[0] + parts[1]
    assert len(set(whole)) == len(whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_a_hugging_face_causal_model_are_moved(side):
    ids, mask = padded([[1, 2, 3], [4, 5]], 5, side)
    labels = unpad(ids, mask, ids, shift=True)["labels"].tolist()  # 99 in padding is no label
    assert labels == [2, 3, IGNORE, 5, IGNORE]
    assert unpad(ids, mask, ids)["labels"].tolist() == [1, 2, 3, 4, 5]
    assert "labels" not in unpad(ids, mask)


def test_pairs():
    ids, mask = padded([[1, 2, 3], [], [4]], 3, "right")
    decoder_ids, decoder_mask = padded([[5], [], [6, 7]], 2, "right")
    inputs = unpad_pairs(ids, mask, decoder_ids, decoder_mask, decoder_ids)
    assert {name: list(value) for name, value in inputs.items() if "seq_lens" in name} == {
        "seq_lens": [3, 1],
        "decoder_seq_lens": [1, 2],
    }
    assert inputs["input_ids"].tolist() == [1, 2, 3, 4]
    assert inputs["labels"].tolist() == inputs["decoder_input_ids"].tolist() == [5, 6, 7]
    names = ("input_ids", "position_ids", "cu_seqlens", "seq_lens", "token_keys")
    assert set(inputs) == {*names, *(f"decoder_{name}" for name in names), "labels"}


def test_what_can_not_be_packed():
    ids, mask = padded([[1, 2, 3], [4, 5, 6]], 4, "right")
    holes = mask.clone()
    holes[1, 1] = 0
    with pytest.raises(DataProblem, match="row 1 has padding between tokens"):
        unpad(ids, holes)
    with pytest.raises(DataProblem, match="no token"):
        unpad(ids, torch.zeros_like(mask))
    with pytest.raises(DataProblem, match=r"attention_mask is \[2, 3\]"):
        unpad(ids, mask[:, :3])
    with pytest.raises(DataProblem, match="labels is"):
        unpad(ids, mask, ids[:1])
    decoder_ids, decoder_mask = padded([[1], []], 2, "right")
    with pytest.raises(DataProblem, match="row 1 has tokens for the encoder or the decoder alone"):
        unpad_pairs(ids, mask, decoder_ids, decoder_mask)
    with pytest.raises(DataProblem, match="2 rows for the encoder, but 1 for the decoder"):
        unpad_pairs(ids, mask, decoder_ids[:1], decoder_mask[:1])
