"""From one language to another (Vaswani et al. 2017): BLEU and chrF, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bigtfm.data.documents import Row
from bigtfm.data.examples import Format, text
from bigtfm.tasks import pairs
from bigtfm.tasks.task import Scores, Task, metric_library

RESAMPLED = 1000


def score(predicted: Sequence[str], gold: Sequence[str]) -> Scores:
    """bleu (Papineni et al. 2002) and chrf (Popovic 2015), sacrebleu's defaults and its own intervals."""
    sacrebleu = metric_library("sacrebleu", "sacrebleu")
    values, intervals = {}, {}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        found = metric.corpus_score(list(predicted), [list(gold)], n_bootstrap=RESAMPLED)
        values[name] = float(found.score)
        middle, half = float(found._mean), float(found._ci)
        intervals[name] = (middle - half, middle + half)
    return Scores(values, intervals=intervals)


def copied(rows: Sequence[Row]) -> list[str]:
    return [text(row, "source") for row in rows]


TASK = Task(
    Format(
        "translation",
        columns={"source": "source", "target": "target"},
        texts=pairs.texts,
        kinds=("sequence_to_sequence", "completion"),
        make=partial(pairs.make, cut=False),
        learnt=frozenset({"target"}),
    ),
    pairs.predict,
    pairs.reference,
    score,
    ("the source as it stands", copied),
)
