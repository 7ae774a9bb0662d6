"""Rules about one document: length and symbols, n-grams of evaluation sets, personal data."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from bigtfm.data.filtering.settings import SHORTEST_NGRAM, Gopher

_WORD = re.compile(r"\w+")
_BULLETS = ("-", "*", "•", "‣", "·", "–", "●", "▪")  # noqa: RUF001
_ELLIPSES = ("...", "…")


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: what is compared with other documents."""
    return _WORD.findall(text.lower())


def broken_rule(text: str, rules: Gopher) -> str | None:
    """The first of Gopher's rules that the text breaks; None: none. Words stand between white space."""
    words = text.split()
    count = len(words)
    if count < rules.min_words or not words:
        return "too few words"
    if count > rules.max_words:
        return "too many words"
    if not rules.min_mean_word <= sum(map(len, words)) / count <= rules.max_mean_word:
        return "mean word length"
    if (text.count("#") + text.count("...") + text.count("…")) / count > rules.max_symbols:
        return "symbols"
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines) > rules.max_bullets:
        return "bullets"
    if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines) > rules.max_ellipses:
        return "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) / count < rules.min_alphabetic:
        return "words without a letter"
    if len({word.lower() for word in words}.intersection(rules.stop_words)) < rules.min_stop_words:
        return "stop words"
    return None


class Ngrams:
    """The n-grams of evaluation sets. Of an item of fewer words, but at least 8, it is the whole of them."""

    def __init__(self, texts: Iterable[str], length: int) -> None:
        self._known: dict[int, set[str]] = {}
        for text in texts:
            words = words_of(text)
            size = min(length, len(words))
            if size >= SHORTEST_NGRAM:
                self._known.setdefault(size, set()).update(ngrams(words, size))
        self._starts = {tuple(ngram.split(" ", 4)[:4]) for known in self._known.values() for ngram in known}

    def in_text(self, words: Sequence[str]) -> bool:
        """Whether one of them is in a document of these words."""
        if self._starts.isdisjoint(zip(words, words[1:], words[2:], words[3:], strict=False)):
            return False
        return any(
            not known.isdisjoint(ngrams(words, size))
            for size, known in self._known.items()
            if len(words) >= size
        )


def ngrams(words: Sequence[str], size: int) -> list[str]:
    """All runs of so many words; of a shorter text the whole."""
    return [" ".join(words[place : place + size]) for place in range(max(1, len(words) - size + 1))]


# --- personal data. A pattern begins with a character that can be searched for, looks behind it only then,
# and has a bound: its time is linear in the length of the text.

_PATTERNS = {
    "email": (r"[\w.%+-](?<![\w.%+-].)[\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w-])",),
    "card": (r"[2-6](?<![\d-].)\d{3}(?:[ -]?\d){9,15}(?![\d-])",),
    "ip": (
        r"\d(?<![\d.].)\d{0,2}(?:\.\d{1,3}){3}(?!\.?\d)",
        r"[0-9A-Fa-f:](?<![\w:].)[0-9A-Fa-f:]{1,35}:[0-9A-Fa-f:.]{1,19}(?![\w:])",
    ),
    "phone": (
        r"\+(?<![\w.+].)\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,5}(?!\w)",
        r"\((?<!\w.)[2-9]\d{2}\) ?\d{3}[ .-]\d{4}(?!\w)",
        r"[2-9](?<![\w.+-].)\d{2}([ .-])\d{3}\1\d{4}(?![\w-])",
    ),
}
_COMPILED = {kind: [re.compile(p, re.ASCII | re.DOTALL) for p in each] for kind, each in _PATTERNS.items()}
_IPV6 = _COMPILED["ip"][1]
_SIXES = re.compile(r":[0-9A-Fa-f]{0,4}:")  # what an IPv6 address must


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1 is right."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def _is_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return 13 <= len(digits) <= 19 and luhn(digits)


def _is_ip(found: str) -> bool:
    try:
        return len(found) > 3 and bool(ipaddress.ip_address(found))
    except ValueError:
        return False


def _is_phone(found: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", found)) <= 15


_CHECKS: Mapping[str, Callable[[str], bool]] = {"card": _is_card, "ip": _is_ip, "phone": _is_phone}


def masked(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """The text with <email>, <card>, <ip>, <phone> in place of those that are asked for; how many of each."""
    counts: Counter[str] = Counter()
    for kind, pattern in _patterns(text, kinds):
        check = _CHECKS.get(kind, bool)

        def replace(match: re.Match[str], kind: str = kind, check: Callable[[str], bool] = check) -> str:
            if not check(match[0]):
                return match[0]
            counts[kind] += 1
            return f"<{kind}>"

        text = pattern.sub(replace, text)
    return text, counts


def _patterns(text: str, kinds: Collection[str]) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Those that could find something in the text."""
    for kind in [kind for kind in _COMPILED if kind in kinds and (kind != "email" or "@" in text)]:
        for pattern in _COMPILED[kind]:
            if pattern is not _IPV6 or _SIXES.search(text) is not None:
                yield kind, pattern
