import hashlib
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import windows_loader
from memory_split import MemorySplit

from bigtfm.config.problems import DataProblem
from bigtfm.config.sections import ObjectiveSection
from bigtfm.data import samples, spans
from bigtfm.data.loader import Batch
from bigtfm.data.masking import PAIR_TOKENS
from bigtfm.data.objectives import make_objective
from bigtfm.data.order import stream_key
from bigtfm.data.spans import _poisson, span_sizes
from bigtfm.data.special import SpecialIds

IGNORE = -100
VOCAB, BOS, EOS, START, MASK = 60, 1, 2, 3, 60  # id 0 is special, too: an unknown token
SENTINELS = tuple(range(260, 60, -1))
IS_SPECIAL = np.array([i < 3 or i >= VOCAB for i in range(261)])
ORDINARY = np.flatnonzero(~IS_SPECIAL)
WORD_STARTS = np.arange(261) % 3 == 0
SPECIAL = SpecialIds(261, BOS, EOS, MASK, SENTINELS, START, IS_SPECIAL, ORDINARY, WORD_STARTS)
VARIANTS = {
    "causal_lm": ("causal_lm", {}),
    "masked_lm": ("masked_lm", {}),
    "only masks": ("masked_lm", {"mask_fraction": 0.3, "mask_random": 0.0, "mask_keep": 0.0}),
    "whole words": ("masked_lm", {"whole_words": True}),
    "pairs": ("masked_lm", {"next_sentence": 1.0}),
    "pairs of whole words": ("masked_lm", {"next_sentence": 1.0, "whole_words": True}),
    "span_corruption": ("span_corruption", {}),
    "long spans": ("span_corruption", {"mask_fraction": 0.5, "span_length": 8.0}),
    "infilling": ("infilling", {"mask_fraction": 0.3}),
}


def make_loader(split, seq_len, variant="masked_lm", *, shuffle=True, seed=5, **changes):
    kind, values = VARIANTS[variant]
    options = ObjectiveSection(**{**values, **changes})
    objective = make_objective(options, kind, SPECIAL, seed)
    return windows_loader(split, seq_len, seed, VOCAB, objective, shuffle=shuffle)


def random_split(seed=0, documents=300, longest=60):
    lengths = np.random.default_rng(seed).integers(1, longest, documents)
    return MemorySplit(lengths, VOCAB, documents=True, seed=seed)


# --- the definitions, token by token ----------------------------------------------------------------------


def bits(index, name, seed=5):
    z = (index * 0x9E3779B97F4A7C15 + stream_key(seed, name)) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def uniform(index, name):
    return (bits(index, name) >> 11) * 2.0**-53


def chosen(count, size, key, name):
    """Those of range(size) that have the `count` smallest random numbers."""
    return set(sorted(range(size), key=lambda i: bits(key + i, name))[:count])


def segments(split, window, sample, seq_len):
    """(tokens, key of the first one, end of the window in the stream) of each segment of a window."""
    first, stop = window * seq_len, min((window + 1) * seq_len, split.num_tokens - 1)
    cuts = [first, *(s for s in split.starts.tolist() if first < s < stop), stop]
    return [(split.tokens[a:b].tolist(), sample * seq_len + a - first, stop) for a, b in pairwise(cuts)]


def masked_oracle(options, split, tokens, key, stop, seq_len):
    types, label = [0] * len(tokens), IGNORE
    if options.next_sentence and len(tokens) >= PAIR_TOKENS:
        text = tokens[tokens[0] == BOS :][: len(tokens) - 3]
        cut = 1 + int(uniform(key, "pair: cut") * (len(text) - 1))
        a, b = text[:cut], text[cut:]
        label = bits(key, "pair: B") >> 63
        if label:
            place = stop + int(uniform(key, "pair: elsewhere") * max(split.num_tokens - seq_len, 1))
            b = []
            while len(b) < len(text) - cut:
                token = int(split.tokens[place % split.num_tokens])
                b += [] if token in (BOS, EOS) else [token]
                place += 1
        tokens = [BOS, *a, EOS, *b, EOS]
        types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    read, labels, word = [], [], 0
    for i, token in enumerate(tokens):
        if i == 0 or not options.whole_words or WORD_STARTS[token]:
            word = i
        if IS_SPECIAL[token] or (i and IS_SPECIAL[tokens[i - 1]]):
            word = i
        hidden = uniform(key + word, "mask") < options.mask_fraction and not IS_SPECIAL[token]
        become = uniform(key + i, "what the masked become")
        labels.append(token if hidden else IGNORE)
        if hidden and become >= 1 - options.mask_random:
            token = ORDINARY[int(uniform(key + i, "random token") * len(ORDINARY))]
        elif hidden and become >= options.mask_keep:
            token = MASK
        read.append(int(token))
    return {"input_ids": read, "labels": labels, "token_type_ids": types, "next_sentence_labels": [label]}


def split_text(tokens):
    """(BOS or nothing, text, EOS or nothing)."""
    head = tokens[: tokens[0] == BOS]
    tokens = tokens[len(head) :]
    tail = tokens[-1:] if tokens[-1:] == [EOS] else []
    return head, tokens[: len(tokens) - len(tail)], tail


def cut_oracle(length, count, key, name):
    cuts = [0, *sorted(i + 1 for i in chosen(count - 1, length - 1, key, name)), length]
    return [b - a for a, b in pairwise(cuts)]


def half_even(x):
    return round(x)  # Python's, as numpy's and TensorFlow's


def corruption_oracle(options, tokens, key):
    head, text, tail = split_text(tokens)
    if len(text) < 2:
        return {"input_ids": tokens, "decoder_input_ids": [START], "labels": [IGNORE]}
    hidden = min(max(half_even(len(text) * options.mask_fraction), 1), len(text) - 1)
    count = min(max(half_even(hidden / options.span_length), 1), hidden, len(text) - hidden)
    key += len(head)
    read, target = [*head], []
    kept = cut_oracle(len(text) - hidden + 2, count + 1, key, "spans: kept")
    kept[0], kept[-1] = kept[0] - 1, kept[-1] - 1
    for keeps, hides, sentinel in zip(
        kept, cut_oracle(hidden, count, key, "spans: hidden"), SENTINELS, strict=False
    ):
        read += [*text[:keeps], sentinel]
        target += [sentinel, *text[keeps : keeps + hides]]
        text = text[keeps + hides :]
    target.append(EOS)
    return {"input_ids": [*read, *text, *tail], "decoder_input_ids": [START, *target[:-1]], "labels": target}


def poisson(draw, mean):
    """The smallest k with draw < P(X <= k)."""
    k, below = 0, math.exp(-mean)
    while draw >= below:
        k += 1
        below += math.exp(k * math.log(mean) - mean - math.lgamma(k + 1))
    return k


def infilling_oracle(options, tokens, key):
    head, text, tail = split_text(tokens)
    key += len(head)
    left, lengths = 0, []
    if len(text) > 1:
        left = min(max(half_even(len(text) * options.mask_fraction), 1), len(text) - 1)
    for i in range(len(text)):
        if left > 0:
            lengths.append(min(poisson(uniform(key + i, "spans: lengths"), options.span_length), left))
            left -= lengths[-1]
    room = sum(max(length - 1, 0) for length in lengths)
    inserts = 0
    for length in [*lengths]:
        inserts += length == 0
    for _ in range(inserts - room):  # the last ones are left out
        del lengths[len(lengths) - 1 - lengths[::-1].index(0)]
    size = len(text) - sum(lengths) + len(lengths)
    masks = chosen(len(lengths), size, key, "spans: where")
    read = []
    for i in range(size):
        takes = lengths.pop(0) if i in masks else 1
        read.append(MASK if i in masks else text[0])
        text = text[takes:]
    return {
        "input_ids": [*head, *read, *tail],
        "decoder_input_ids": [START, *tokens[:-1]],
        "labels": tokens,
    }


def oracle(loader, kind, options, batch, first):
    """Every field of a batch, as lists."""
    want = {"seq_lens": [], "decoder_seq_lens": [], "position_ids": [], "decoder_position_ids": []}
    want |= {"token_keys": [], "decoder_token_keys": []}
    for sample, window in enumerate(batch.samples, first):
        for tokens, key, stop in segments(loader.stream, window, sample, loader.seq_len):
            if kind == "masked_lm":
                made = masked_oracle(options, loader.stream, tokens, key, stop, loader.seq_len)
            else:
                made = (corruption_oracle if kind == "span_corruption" else infilling_oracle)(
                    options, tokens, key
                )
            for side, stretch in (("", 1), ("decoder_", 2)):
                ids = made.get(f"{side}input_ids", [])
                made[f"{side}seq_lens"] = [len(ids)] if ids else []
                made[f"{side}position_ids"] = list(range(len(ids)))
                made[f"{side}token_keys"] = [stretch * key + i for i in range(len(ids))]
            for name, values in made.items():
                want.setdefault(name, []).extend(values)
    if not options.next_sentence:
        want.pop("token_type_ids", None), want.pop("next_sentence_labels", None)
    return {name: values for name, values in want.items() if values}


def as_lists(batch):
    given = batch.model_inputs()
    if "labelled" in given:
        assert torch.equal(given.pop("labelled"), (batch.labels != IGNORE).nonzero()[:, 0])
    for name in ("cu_seqlens", "decoder_cu_seqlens"):
        if name in given:
            lengths = given[name.replace("cu_seqlens", "seq_lens")]
            assert given[name].dtype == torch.int32
            assert given.pop(name).tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for name, value in given.items():
        assert isinstance(value, tuple) or value.dtype == torch.int64, name
    return {name: [*value] if isinstance(value, tuple) else value.tolist() for name, value in given.items()}


@settings(max_examples=250, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15),
    seq_len=st.integers(1, 45),
    count=st.integers(1, 5),
    first=st.integers(0, 1000),
    kind=st.sampled_from(["masked_lm", "span_corruption", "infilling"]),
    values=st.fixed_dictionaries({
        "mask_fraction": st.floats(0.01, 0.99),
        "mask_random": st.sampled_from([0.0, 0.1, 0.5]),
        "mask_keep": st.sampled_from([0.0, 0.1, 0.5]),
        "whole_words": st.booleans(),
        "next_sentence": st.sampled_from([0.0, 1.0]),
        "span_length": st.one_of(st.just(1.0), st.floats(1, 12)),
    }),
    shuffle=st.booleans(),
)  # fmt: skip
def test_a_batch_is_what_the_definition_says(lengths, seq_len, count, first, kind, values, shuffle):
    split = MemorySplit(lengths, VOCAB, documents=True, seed=seq_len)
    if split.num_tokens <= (seq_len if shuffle else 1):
        return
    options = ObjectiveSection(**values)
    loader = windows_loader(
        split, seq_len, 5, VOCAB, make_objective(options, kind, SPECIAL, 5), shuffle=shuffle
    )
    if not shuffle:
        first %= loader.num_samples
        count = min(count, loader.num_samples - first)
    batch = loader.batch(first, count)
    if kind != "masked_lm":
        options = options.model_copy(update={"next_sentence": 0.0})
    assert as_lists(batch) == oracle(loader, kind, options, batch, first)
    assert batch.num_labels == int((batch.labels != IGNORE).sum())


# --- functions of seed and place ---------------------------------------------------------------------------


def joined(a, b):
    """Two batches one behind the other."""
    out = {}
    for name, value in vars(a).items():
        other = getattr(b, name)
        if value is None:
            assert other is None
        elif "cu_seqlens" in name:
            out[name] = torch.cat([value[:-1], other + value[-1]])
        elif name == "labelled":
            out[name] = torch.cat([value, other + len(a.labels)])
        else:
            out[name] = torch.cat([value, other]) if isinstance(value, torch.Tensor) else value + other
    return Batch(**out)


def same(a, b):
    return all(
        torch.equal(value, getattr(b, name)) if isinstance(value, torch.Tensor) else value == getattr(b, name)
        for name, value in vars(a).items()
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_is_its_parts_one_behind_the_other(variant, shuffle):
    split = random_split(documents=20)
    loader = make_loader(split, 24, variant, shuffle=shuffle)
    assert (split.num_tokens - 1) % 24, "the last window has to be a short one here"
    first = (split.num_tokens - 1) // 24 - 3
    whole = loader.batch(first, 4)
    other = make_loader(split, 24, variant, shuffle=shuffle)
    late = other.batch(first + 3, 1)  # in another order, by another loader
    assert same(whole, joined(other.batch(first, 3), late))
    assert same(whole, joined(loader.batch(first, 1), loader.batch(first + 1, 3)))
    assert not same(whole, joined(late, loader.batch(first, 3)))  # negative control


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"causal_lm"}))
def test_each_epoch_hides_other_tokens_but_evaluation_always_the_same(variant):
    split = random_split()
    loader = make_loader(split, 64, variant)
    n = (split.num_tokens - 1) // 64
    again = {window: n + place for place, window in enumerate(loader.ids(n, n).tolist())}
    first = [(loader.batch(i, 1), loader.batch(again[w], 1)) for i, w in enumerate(loader.ids(0, 20))]
    assert all(a.samples == b.samples for a, b in first)
    changed = [a.input_ids.tolist() != b.input_ids.tolist() for a, b in first]
    assert sum(changed) >= 19
    for seed in (5, 6):
        one, two = (make_loader(split, 64, variant, shuffle=False, seed=seed).batch(3, 5) for _ in range(2))
        assert same(one, two)
    assert not same(one, make_loader(split, 64, variant, shuffle=False).batch(3, 5))  # another seed


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"pairs", "pairs of whole words"}))
def test_a_document_knows_nothing_of_its_neighbours(variant):
    """Other tokens in every second document change nothing in the others (of which pairs may quote)."""
    split = random_split()
    changed = random_split()
    stops = np.append(split.starts[1:], split.num_tokens)
    for a, b in zip(split.starts[::2], stops[::2], strict=True):
        changed.tokens[a + 1 : b - 1] = 3 + (changed.tokens[a + 1 : b - 1] + 1) % 57
    one, two = (make_loader(s, 64, variant, shuffle=False).batch(0, 50) for s in (split, changed))
    segment_starts = sorted({*split.starts.tolist(), *range(0, 50 * 64, 64)})
    documents = np.searchsorted(split.starts, segment_starts, side="right") - 1
    kept = differ = 0
    for n, document in enumerate(documents[: len(one.seq_lens)].tolist()):
        pieces = [[segment(batch, side, n) for side in ("", "decoder_")] for batch in (one, two)]
        if document % 2:
            assert pieces[0] == pieces[1]
            kept += 1
        else:
            differ += pieces[0] != pieces[1]
    assert kept > 50
    assert differ > 50  # negative control: the comparison sees a change


def segment(batch, side, n):
    """Ids and labels of document n of one side."""
    cu = getattr(batch, f"{side}cu_seqlens")
    if cu is None:
        return None
    ids = getattr(batch, f"{side}input_ids")[cu[n] : cu[n + 1]].tolist()
    has_labels = bool(side) == (batch.decoder_input_ids is not None)
    return ids, batch.labels[cu[n] : cu[n + 1]].tolist() if has_labels else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_tokens_of_an_epoch_have_the_same_key(variant):
    split = random_split(longest=9)
    loader = make_loader(split, 16, variant)
    batches = [loader.batch(i, 7) for i in range(0, (split.num_tokens - 1) // 16, 7)]
    for name in ("token_keys", "decoder_token_keys"):
        keys = [getattr(batch, name) for batch in batches]
        if keys[0] is not None:
            keys = torch.cat(keys)
            assert len(keys.unique()) == len(keys)


PINNED = {  # made by the version of November 2026: training samples from 1000 on, last validation windows
    "causal_lm": ("ffecf0465b482603", "957bcc082fdbd4bc"),
    "masked_lm": ("f93a896bd9a1b46a", "9592aa16466cf8a5"),
    "only masks": ("b8f53d11faa414dc", "9ebf83554bac2864"),
    "whole words": ("4047b79e33d8e3d2", "2b9f449c84c75d64"),
    "pairs": ("693858ed783134d9", "8214a1bfbd691244"),
    "pairs of whole words": ("56aed1a116ab4416", "563de1e821934e00"),
    "span_corruption": ("03c3b196b1bb1a1c", "7123f017f76850bd"),
    "long spans": ("27a7b9fb0e872477", "f8add4053ffba614"),
    "infilling": ("d057434e09baba83", "c12e52d209ca267c"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_are_pinned(variant):
    """Changing them would silently change the loss of every run that is resumed."""
    last = make_loader(random_split(), 64, variant, shuffle=False)
    validation = last.batch(last.num_samples - 4, 4)
    assert (digests()[variant], fingerprint(validation)) == PINNED[variant]


PRINT_DIGESTS = """
import sys
sys.path[:0] = sys.argv[1:]
import test_objectives
print(test_objectives.digests())
"""


def fingerprint(batch):
    """SHA-256 of all of its fields, in 16 digits; of labels, their places follow."""
    fields = [value for name, value in vars(batch).items() if name != "labelled"]
    content = [v.tolist() if isinstance(v, torch.Tensor) else v for v in fields]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def digests():
    """Fingerprint of a training batch of each objective."""
    return {v: fingerprint(make_loader(random_split(), 64, v).batch(1000, 4)) for v in VARIANTS}


def test_another_process_makes_the_same_batches():
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-c", PRINT_DIGESTS, folder, os.path.dirname(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(digests())
    assert len(set(digests().values())) == len(VARIANTS)  # they see a difference


# --- statistics ---------------------------------------------------------------------------------------------


def within_noise(count, trials, probability):
    return abs(count - trials * probability) < 4.5 * math.sqrt(trials * probability * (1 - probability)) + 1


def test_masked_tokens_are_as_many_as_asked_and_become_what_is_asked():
    split = random_split(documents=3000)
    loader, plain = make_loader(split, 128), make_loader(split, 128, "causal_lm")
    count = (split.num_tokens - 1) // 128
    batch, original = loader.batch(0, count), plain.batch(0, count).input_ids
    hidden = batch.labels != IGNORE
    ordinary = ~torch.from_numpy(IS_SPECIAL)[original]
    assert not (hidden & ~ordinary).any()
    assert torch.equal(batch.labels[hidden], original[hidden])
    assert torch.equal(batch.input_ids[~hidden], original[~hidden])
    total = int(hidden.sum())
    assert total > 10_000
    assert within_noise(total, int(ordinary.sum()), 0.15)
    assert not within_noise(total, int(ordinary.sum()), 0.16)  # negative control
    read, truth = batch.input_ids[hidden], original[hidden]
    masks = int((read == MASK).sum())
    assert within_noise(masks, total, 0.8)
    same_id = 0.1 + 0.1 / len(ORDINARY)  # a random token may be the token itself
    assert within_noise(int((read == truth).sum()), total, same_id)
    random = read[(read != MASK) & (read != truth)]
    assert set(random.tolist()) == set(ORDINARY.tolist())
    chi_square = sum(
        (n - len(random) / 57) ** 2 for n in Counter(random.tolist()).values()
    ) / (len(random) / 57)  # fmt: skip
    assert chi_square < 56 + 4.5 * math.sqrt(2 * 56)
    neighbours = int((hidden[1:] & hidden[:-1]).sum())  # independent of each other
    assert within_noise(neighbours, int((ordinary[1:] & ordinary[:-1]).sum()), 0.15**2)


def words_of(tokens, seq_lens):
    """Places of each word of ordinary tokens."""
    words, ends = [], set(np.cumsum(seq_lens).tolist())
    for i, token in enumerate(tokens):
        new = i == 0 or i in ends or WORD_STARTS[token] or IS_SPECIAL[tokens[i - 1]]
        if not IS_SPECIAL[token]:
            words = [*words, [i]] if new else [*words[:-1], [*words[-1], i]]
    return words


def test_whole_words_are_hidden_whole():
    split = random_split(documents=60)
    original = make_loader(split, 64, "causal_lm").batch(0, 20)
    words = words_of(original.input_ids.tolist(), original.seq_lens)
    broken = {}
    for variant in ("whole words", "masked_lm"):
        hidden = (make_loader(split, 64, variant).batch(0, 20).labels != IGNORE).tolist()
        broken[variant] = sum(len({hidden[i] for i in word}) > 1 for word in words)
        assert 0.05 < sum(hidden) / len(hidden) < 0.3
    assert broken["whole words"] == 0
    assert broken["masked_lm"] > 50  # negative control


def test_pairs():
    split = random_split(documents=2000)
    loader = make_loader(split, 64, "pairs", mask_fraction=1e-9)
    plain = make_loader(split, 64, "causal_lm").batch(0, 500)
    batch = loader.batch(0, 500)
    assert batch.seq_lens == plain.seq_lens
    labels = batch.next_sentence_labels.tolist()
    assert [label != IGNORE for label in labels] == [n >= PAIR_TOKENS for n in batch.seq_lens]
    assert within_noise(labels.count(1), labels.count(0) + labels.count(1), 0.5)
    pieces = zip(
        batch.input_ids.split(batch.seq_lens), batch.token_type_ids.split(batch.seq_lens),
        plain.input_ids.split(batch.seq_lens), labels, strict=True,
    )  # fmt: skip
    text = split.tokens[(split.tokens != BOS) & (split.tokens != EOS)]
    stream = "".join(map(chr, [*text, *text[:64]]))
    relative_cuts = []
    for tokens, types, before, label in pieces:
        if label == IGNORE:
            assert torch.equal(tokens, before)
            assert not types.any()
            continue
        types = types.tolist()
        cut = types.index(1)
        assert types == sorted(types)
        a, b = tokens[1 : cut - 1].tolist(), tokens[cut:-1].tolist()
        assert [tokens[0], tokens[cut - 1], tokens[-1]] == [BOS, EOS, EOS]
        assert min(len(a), len(b)) > 0
        assert not {BOS, EOS} & {*a, *b}
        before = split_text(before.tolist())[1]
        assert a == before[: len(a)]
        assert (b == before[len(a) : len(a) + len(b)]) == (label == 0) or len(b) < 3
        assert "".join(map(chr, b)) in stream
        relative_cuts.append((len(a) - 0.5) / (len(a) + len(b) - 1))
    assert abs(np.mean(relative_cuts) - 0.5) < 4.5 * math.sqrt(1 / 12 / len(relative_cuts))


def test_a_foreign_sentence_with_a_token_outside_the_vocabulary():
    split = random_split()
    split.tokens[5000:] = VOCAB + 7
    loader = make_loader(split, 64, "pairs", shuffle=False)
    with pytest.raises(DataProblem, match="beyond the vocabulary"):
        loader.batch(0, 70)


def restored(read, target):
    """The text that a T5 example was made of."""
    target, spans_ = target[:-1], {}
    for token in target:
        if token in SENTINELS:
            spans_[token] = hidden = []
        else:
            hidden.append(token)
    return [t for token in read for t in spans_.get(token, [token])], list(spans_), spans_


def test_corrupted_spans_hold_the_text_and_have_t5s_sizes():
    split = random_split(longest=150)
    batch = make_loader(split, 128, "span_corruption").batch(0, 60)
    plain = make_loader(split, 128, "causal_lm").batch(0, 60)
    originals = plain.input_ids.split(plain.seq_lens)
    seen = 0
    for n, tokens in enumerate(originals):
        read, target = segment(batch, "", n)[0], segment(batch, "decoder_", n)[1]
        head, text, tail = split_text(tokens.tolist())
        if target == [IGNORE]:
            assert len(text) < 2
            assert read == tokens.tolist()
            continue
        assert target[-1] == EOS
        whole, sentinels, hidden = restored(read, target)
        assert whole == tokens.tolist()
        assert sentinels == list(SENTINELS[: len(sentinels)])  # 0, 1, 2, ...
        assert [token for token in read if token in SENTINELS] == sentinels
        noise = min(max(round(len(text) * 0.15), 1), len(text) - 1)
        assert sum(map(len, hidden.values())) == noise
        assert len(sentinels) == max(round(noise / 3), 1)
        assert all(hidden.values())
        assert read[: len(head)] + read[len(read) - len(tail) :] == head + tail
        seen += len(sentinels) > 3
    assert seen > 20


@pytest.mark.parametrize("variant", ["pairs", "span_corruption", "infilling"])
def test_a_tokenizer_without_bos(variant):
    """A document then begins with EOS, too."""
    split = random_split(longest=25)
    split.tokens[split.tokens == BOS] = EOS
    kind, values = VARIANTS[variant]
    objective = make_objective(ObjectiveSection(**values), kind, replace(SPECIAL, bos=EOS), 5)
    batch = windows_loader(split, 24, 5, VOCAB, objective, shuffle=False).batch(0, 60)
    plain = make_loader(split, 24, "causal_lm", shuffle=False).batch(0, 60)
    whole = [tokens.tolist() for tokens in plain.input_ids.split(plain.seq_lens)]
    texts = [tokens[tokens[0] == EOS and len(tokens) > 1 :] for tokens in whole]  # EOS ends a text
    for n, (tokens, text) in enumerate(zip(whole, texts, strict=True)):
        if variant == "span_corruption":
            read, target = segment(batch, "", n)[0], segment(batch, "decoder_", n)[1]
            assert target == [IGNORE] or EOS not in target[:-1]
            assert restored(read, target)[0] == text
        if variant == "infilling":
            assert segment(batch, "decoder_", n)[1] == (text if tokens != [EOS] else [IGNORE])
    decodes = variant in ("span_corruption", "infilling")
    ends = sum(tokens.count(EOS) for tokens in (texts if decodes else whole))
    if variant != "pairs":
        assert int((batch.input_ids == EOS).sum()) == ends  # none is hidden
    else:
        assert batch.seq_lens == plain.seq_lens


def partition_chi_square(cut):
    """How far cuts of 7 items into 3 spans are from being equally likely, in standard deviations."""
    groups = 15 * 400
    lengths, counts = np.full(groups, 7), np.full(groups, 3)
    pieces = cut(lengths, counts, np.arange(groups) * 7, 99).reshape(groups, 3)
    assert (pieces.sum(1) == 7).all()
    assert pieces.min() >= 1
    seen = Counter(map(tuple, pieces.tolist()))
    chi_square = sum((seen[way] - 400) ** 2 / 400 for way in seen) + 400 * (15 - len(seen))
    return abs(chi_square - 14) / math.sqrt(28)


def test_every_way_to_cut_is_equally_likely(monkeypatch):
    assert partition_chi_square(spans._cut) < 4
    monkeypatch.setattr(samples, "random_bits", lambda index, key: (index * 5 % 6).astype(np.uint64))
    assert partition_chi_square(spans._cut) > 50  # negative control: a poor hash


def test_a_short_text_loses_any_of_its_tokens():
    """With T5's own arrangement it would always be the last one."""
    texts = 2000
    options = ObjectiveSection(mask_fraction=0.1)
    lengths = np.full(texts, 10)
    hidden = spans._noise(lengths, *span_sizes(lengths, options), np.arange(texts) * 10, 5)
    counts = hidden.reshape(texts, 10).sum(0)
    assert counts.sum() == texts
    assert all(within_noise(count, texts, 0.1) for count in counts)


def test_a_text_never_has_more_spans_than_it_can_hold():
    for fraction in (0.01, 0.15, 0.5, 0.99):
        for span_length in (1.0, 3.0, 50.0):
            lengths = np.arange(300)
            options = ObjectiveSection(mask_fraction=fraction, span_length=span_length)
            hidden, count = span_sizes(lengths, options)
            assert not hidden[:2].any()
            assert not count[:2].any()
            assert (count[2:] >= 1).all()
            assert (hidden[2:] >= count[2:]).all()
            assert (lengths - hidden >= count).all()
            assert (np.diff(hidden + count)[2:] >= 0).all()  # so the longest text has the longest target


def test_infilled_spans_are_poisson():
    options = ObjectiveSection(mask_fraction=0.5, span_length=3.0)
    lengths = np.array([40_000])
    owner, sizes = spans._poisson_spans(lengths, np.array([0]), options, 5)
    assert not owner.any()
    assert sizes.sum() == 20_000
    seen, n = np.bincount(sizes, minlength=13), len(sizes)
    for k in range(9):
        assert within_noise(seen[k], n, math.exp(-3) * 3**k / math.factorial(k))
    assert not within_noise(seen[0], n, math.exp(-4))  # negative control


@pytest.mark.parametrize(("fraction", "span_length"), [(0.3, 3.0), (0.9, 1.0), (0.05, 12.0)])
def test_infilling_asks_for_the_whole_segment_and_reads_less(fraction, span_length):
    split = random_split(longest=150)
    changes = {"mask_fraction": fraction, "span_length": span_length}
    batch = make_loader(split, 128, "infilling", **changes).batch(0, 60)
    plain = make_loader(split, 128, "causal_lm").batch(0, 60)
    assert torch.equal(batch.labels, plain.input_ids)
    assert batch.decoder_seq_lens == plain.seq_lens
    assert all(read <= whole for read, whole in zip(batch.seq_lens, plain.seq_lens, strict=True))
    kept = int((batch.input_ids != MASK).sum()) / len(plain.input_ids)
    assert abs(1 - kept - fraction) < 0.1 * fraction + 0.02
    for n in range(len(batch.seq_lens)):  # what is left stands in its order
        rest = iter(segment(batch, "decoder_", n)[1])
        assert all(token in rest for token in segment(batch, "", n)[0] if token != MASK)


@pytest.mark.parametrize(("start", "eos"), [(BOS, EOS), (START, BOS), (BOS, BOS)])
def test_infilling_writes_no_bos_where_it_was_read_or_ends_the_text(start, eos):
    """Else a model without absolute positions writes BOS for ever, or ends before it has begun."""
    special = replace(SPECIAL, start=start, eos=eos)
    split = random_split(longest=20)
    options = ObjectiveSection(mask_fraction=0.3)
    objective = make_objective(options, "infilling", special, 5)
    loader = windows_loader(split, 64, 5, VOCAB, objective)
    batch, plain = loader.batch(0, 30), make_loader(split, 64, "causal_lm").batch(0, 30)
    whole = plain.input_ids.split(plain.seq_lens)
    read, written = (x.split(batch.decoder_seq_lens) for x in (batch.decoder_input_ids, batch.labels))
    for text, asked, answer in zip(whole, read, written, strict=True):
        expected = text[1:] if text[0] == BOS else text
        assert answer.tolist() == (expected.tolist() or [IGNORE])
        assert asked.tolist() == [start, *expected[:-1].tolist()]
    assert batch.num_labels == int((batch.labels != IGNORE).sum())


def test_model_inputs_are_the_contract():
    base = {"input_ids", "labels", "position_ids", "cu_seqlens", "seq_lens", "token_keys"}
    names = ("input_ids", "position_ids", "cu_seqlens", "seq_lens", "token_keys")
    decoder = {f"decoder_{name}" for name in names}
    pairs = {"token_type_ids", "next_sentence_labels", "labelled"}
    extra = {"masked_lm": {"labelled"}, "pairs": pairs, "span_corruption": decoder, "infilling": decoder}
    for variant in ("causal_lm", "masked_lm", "pairs", "span_corruption", "infilling"):
        batch = make_loader(random_split(), 64, variant).batch(0, 3)
        assert set(batch.model_inputs()) == base | extra.get(variant, set())
        moved = batch.to("meta")
        assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("mean", [50.0, 1e9, 1e300])
def test_spans_longer_than_any_text_cost_nothing(mean):
    """The table of lengths ends with the longest text."""
    assert len(_poisson(mean, 40)) == 40
    assert (_poisson(mean, 40) <= 1).all()
