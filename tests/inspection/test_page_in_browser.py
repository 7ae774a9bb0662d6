"""The page in a browser: what it shows, what a pointer finds, colour schemes, hostile text, no network.

Without Chromium and playwright these tests are skipped and say why; in CI that is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace

import pytest
from small_models import save_run

from bigtfm.inspection.page import page
from bigtfm.inspection.reading import read
from bigtfm.inspection.report import Selection, look
from bigtfm.run_directory import open_run

HOSTILE = "a</script><img src=x onerror=alert(1)><b>bold</b>&amp;{{data}}<!--你好"
LONG = " ".join(["The state of the Union is strong because the people of America are strong."] * 12)
PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")

pytestmark = pytest.mark.slow  # the browser's start


def require_browser():
    """The program to start."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    missing = [] if program else [f"a Chromium ({', '.join(PROGRAMS)})"]
    missing += [] if importlib.util.find_spec("playwright") else ["the package playwright"]
    if missing:
        reason = f"needs {' and '.join(missing)}: make browser-packages"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return program


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_browser_it_says_so(ci, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(outcome, match=r"needs a Chromium .*make browser-packages"):
        require_browser()


@pytest.fixture(scope="module")
def chromium():
    """A running browser."""
    program = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        running = playwright.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_data):
    """By name: (the page's file, the report that is in it)."""
    folder = tmp_path_factory.mktemp("shown")
    save_run(folder / "gpt", tiny_data / "tokenizer", "gpt", max_seq_len=1024)
    save_run(folder / "t5", tiny_data / "tokenizer", "t5", "span_corruption", max_seq_len=256)
    shape = {"num_labels": 3, "next_sentence": False}
    save_run(folder / "task", tiny_data / "tokenizer", "bert", "classification", **shape)
    texts = {
        "task": ("task", "The people", None),
        "gpt": ("gpt", "The people of America", None),
        "hostile": ("gpt", "The people of America", None),
        "long": ("gpt", LONG, None),
        "t5": ("t5", "The state of the <extra_id_0> is strong", "<extra_id_0> Union <extra_id_1>"),
    }
    found = {}
    for name, (run, text, target) in texts.items():
        model, tokenizer, special = open_run(folder / run)
        reading = read(model, tokenizer, special, text, target=target)
        report = look(model, tokenizer, special, reading, Selection(), f"runs/{run}")
        if name == "hostile":  # as a tokenizer may have such a token
            words = [HOSTILE] * len(report.said)
            report = replace(report, words={"decoder": words}, said=words, facts={HOSTILE: HOSTILE})
        path = folder / f"{name}.html"
        path.write_text(page(report), encoding="utf-8")
        found[name] = path, report
    return found


class Opened:
    """A page in the browser, and what it has asked for and complained about."""

    def __init__(self, browser, path, address="", scheme="light", width=1280):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.asked, self.said = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on(
            "dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss())
        )
        self.page.goto(f"{path.as_uri()}{address}")

    def ready(self):
        self.page.wait_for_selector("body[data-ready]", timeout=20_000)
        return self

    def tip(self):
        return self.page.locator("#tip").inner_text()


@pytest.fixture
def look_at(chromium, shown):
    pages = []

    def open_it(name, **options):
        pages.append(Opened(chromium, shown[name][0], **options).ready())
        return pages[-1]

    yield open_it
    for opened in pages:
        opened.page.close()


@pytest.mark.parametrize("name", ["gpt", "t5", "hostile", "long", "task"])
def test_it_opens_and_asks_for_nothing(name, look_at, shown):
    opened = look_at(name)
    path, report = shown[name]
    assert opened.asked == [path.as_uri()]
    assert opened.said == []
    assert opened.page.locator("#loss-strip .token").count() == len(report.said)
    assert opened.page.locator("#lens-table tbody tr").count() == len(report.lens)
    assert opened.page.is_visible("#lens") == (name != "task")


def test_layers_and_heads_are_chosen(look_at, shown):
    """By the lists, by the small maps and by the address; the numbers are the exact ones."""
    _, report = shown["gpt"]
    weights, words = report.maps[0].weights, report.words["decoder"]
    opened = look_at("gpt", address="#kind=decoder&layer=2&head=1")
    page = opened.page
    pictures = [page.evaluate("document.getElementById('map').toDataURL()")]
    assert (page.input_value("#layer"), page.input_value("#view")) == ("2", "1")
    for query, keys in enumerate(weights[2, 1]):
        page.hover(f"#queries .token[data-place='{query}']")
        found = page.eval_on_selector_all(
            "#queries .token", "all => all.map(one => Number(one.dataset.weight))"
        )
        assert found == pytest.approx(keys.tolist(), abs=1e-4)
        assert words[keys.argmax()] in opened.tip().splitlines()[2]
    page.select_option("#layer", "0")
    page.select_option("#view", "3")
    pictures.append(page.evaluate("document.getElementById('map').toDataURL()"))
    assert page.url.endswith("#kind=decoder&layer=0&head=3")
    page.click("#overview button[data-at='1 rollout']")
    pictures.append(page.evaluate("document.getElementById('map').toDataURL()"))
    assert (page.input_value("#layer"), page.input_value("#view")) == ("1", "rollout")
    assert page.locator("#overview button[aria-pressed=true]").count() == 1
    assert len(set(pictures)) == 3, "each has a picture of its own"


def test_the_map_tells_the_weight_under_the_pointer(look_at, shown):
    _, report = shown["t5"]
    weights = report.maps[2].weights
    opened = look_at("t5")
    page = opened.page
    page.click("#kinds button:has-text('decoder to encoder')")
    page.select_option("#layer", "1")
    page.select_option("#view", "2")
    canvas = page.locator("#map")
    queries, keys = weights.shape[2:]
    for query, key in ((0, 0), (2, 5), (queries - 1, keys - 1)):
        left, top, width, height = page.evaluate("[mapGrid.left, mapGrid.top, mapGrid.width, mapGrid.height]")
        canvas.hover(position={"x": left + (key + 0.5) * width, "y": top + (query + 0.5) * height})
        lines = opened.tip().splitlines()
        assert lines[0] == f"{report.words['decoder'][query]} ({query})"
        assert lines[1] == f"looks at {report.words['encoder'][key]} ({key})"
        assert float(lines[2]) == pytest.approx(weights[1, 2, query, key].item(), abs=1e-4)
    page.hover("#norm-map", position={"x": 5, "y": 5})
    assert not page.is_visible("#tip")


def test_the_loss_and_the_lens_tell_more_under_the_pointer(look_at, shown):
    _, report = shown["gpt"]
    opened = look_at("gpt")
    opened.page.hover("#loss-strip .token >> nth=2")
    assert f"loss {report.judged[2].loss:.3f}" in opened.tip()
    assert f"rank {report.judged[2].rank}" in opened.tip()
    assert report.judged[2].expected[0][0] in opened.tip()
    opened.page.hover("#lens-table tbody tr:nth-child(2) td >> nth=1")
    assert all(word.strip() in opened.tip() for word, _ in report.lens[1][1])
    assert "layer 0" in opened.tip()


def test_hostile_text_is_text(look_at, shown):
    opened = look_at("hostile")
    page = opened.page
    assert page.locator("img, b:visible").count() == 0
    strip = page.locator("#loss-strip .token").all_inner_texts()
    assert strip == shown["hostile"][1].said
    page.hover("#loss-strip .token >> nth=1")
    assert opened.tip().startswith(HOSTILE)
    assert opened.said == []


def test_nothing_else_may_run(chromium, shown, tmp_path):
    """Were something not escaped, the page's policy would stop it. The control: without it, it runs."""
    html = shown["gpt"][0].read_text(encoding="utf-8")
    attack = "<script>alert(1)</script><h1>"
    guarded, open_ = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(html.replace("<h1>", attack), encoding="utf-8")
    open_.write_text(
        html.replace("<h1>", attack).replace("Content-Security-Policy", "none"), encoding="utf-8"
    )
    for path, runs in ((guarded, False), (open_, True)):
        opened = Opened(chromium, path).ready()
        assert ("dialog 1" in opened.said) == runs
        opened.page.close()


def test_a_script_that_was_changed_does_not_run(chromium, shown, tmp_path):
    """The control of the other tests: they would see a page that fails."""
    html = shown["gpt"][0].read_text(encoding="utf-8")
    (tmp_path / "changed.html").write_text(html.replace('"use strict";', '"use strict"; '), encoding="utf-8")
    opened = Opened(chromium, tmp_path / "changed.html")
    assert any("Content Security Policy" in line for line in opened.said)
    assert opened.page.locator("body[data-ready]").count() == 0
    opened.page.close()


CONTRAST = """all => all.filter(one => one.innerText.trim()).map(one => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(one), page = getComputedStyle(document.body).backgroundColor;
  const back = style.backgroundColor === "rgba(0, 0, 0, 0)" ? page : style.backgroundColor;
  const [low, high] = [light(style.color), light(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_words_can_be_read_on_their_colours(name, scheme, look_at):
    """The contrast that WCAG 2.2 asks of text (level AA), in both colour schemes."""
    opened = look_at(name, scheme=scheme)
    page = opened.page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    contrasts = page.eval_on_selector_all(".token, #lens-table td, th, .note, label, dd, dt", CONTRAST)
    assert len(contrasts) > 40
    assert min(contrasts) >= 4.5


@pytest.mark.parametrize("width", [380, 800, 1600])
@pytest.mark.parametrize("name", ["long", "hostile"])
def test_it_fits_into_the_window(name, width, look_at):
    opened = look_at(name, width=width)
    assert opened.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    if name == "long" and width >= 800:  # on a telephone the map of 200 tokens may be scrolled
        assert opened.page.locator("#queries .token").count() > 200
        assert opened.page.locator("#map").bounding_box()["width"] <= width
