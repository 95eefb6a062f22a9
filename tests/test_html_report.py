"""The page of a report in a real browser: what it shows, what it does, and what it never does."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given, settings
from playwright.sync_api import Browser, Page, expect

from memscrub.faces.findings import LOCALITY_LIMITS
from memscrub.faces.html_report import render
from memscrub.faces.html_rows import row_data
from memscrub.faces.html_tokens import TokenView, strip
from memscrub.faces.html_view import limit_rows
from memscrub.reports.judgement import Finding, Judgement, Status
from memscrub.reports.report import NeighbourRecord, Report
from tests.browser import Watched, started
from tests.reports import fixed, text
from tests.test_report import REPORTS

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&\u202e\x1b[31m\u2028`${1}"
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b").replace("\u2028", "\\u2028")
WORDS = ("Zwei", " quartz", " goblins", " vex", " Ida")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


def view(*, tokens: bool = False) -> TokenView:
    """Five tokens: before the edit all come out, after it the third does not."""
    before = strip([0.2, 3.0, 5.0, 7.0, 20.0], [-0.6, -0.1, -0.05, -0.01, 0.0])
    after = strip([0.2, 3.0, -1.5, 7.0, 20.0], [-0.6, -0.1, -1000.0, -0.01, 0.0])
    return TokenView(1, before, after, judged=1, secrets=((3, 5),), tokens=WORDS if tokens else None)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    yield opened
    opened.close()


def show(page: Page, folder: Path, html: str) -> tuple[Watched, str]:
    """Open the page from a file and wait until its rows are usable; the watch and the file's address."""
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    watched = Watched(page)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    return watched, file.as_uri()


def ids(page: Page) -> list[str]:
    return page.locator("#rows tbody th bdi").all_text_contents()


def head(page: Page, name: str) -> str | None:
    return page.locator("#rows thead th", has=page.get_by_role("button", name=name)).get_attribute("aria-sort")


def test_the_verdict_stands_first_with_the_limit_that_decided_it(page: Page, tmp_path: Path) -> None:
    report = fixed(14)
    watched, own = show(page, tmp_path, render(report))
    expect(page.get_by_role("heading", level=1)).to_have_text("Policy not reached")
    assert report.verdict.reasons[0] in page.locator(".verdict").inner_text()
    assert "2 of 14 protected texts break a limit" in page.locator(".lead").inner_text()
    assert watched.messages == [] and watched.outside(own) == []


def test_a_pass_names_the_limit_that_came_closest_to_being_broken(page: Page, tmp_path: Path) -> None:
    report = fixed(3)
    show(page, tmp_path, render(report))
    expect(page.get_by_role("heading", level=1)).to_have_text("Within the policy")
    # A similarity of 0.3 where 0.6 is allowed; the runs use 1 of 16 tokens, locality 0.002 of 0.01.
    assert "max_near_verbatim, class books" in page.locator(".closest").inner_text()


def test_every_figure_of_before_and_after_is_the_reports(page: Page, tmp_path: Path) -> None:
    report = fixed(14)
    show(page, tmp_path, render(report))
    books = page.get_by_role("article", name="books")
    broken = sum(t.judgement.status.value == "violated" for t in report.texts if t.class_name == "books")
    assert f"{broken} break" in books.inner_text() and "10 break" in books.inner_text()
    longest = max(t.latest.match_run for t in report.texts if t.class_name == "books")
    assert f"{longest} tokens" in books.inner_text()
    row = page.locator("table.limits tbody tr", has_text="secrets_emitted")
    expect(row).to_contain_text("holds" if broken == 2 else "broken")


def test_rows_sort_by_every_column_in_both_directions(page: Page, tmp_path: Path) -> None:
    report = fixed(40)
    show(page, tmp_path, render(report))
    violated = [each.id for each in report.texts if each.judgement.status.value == "violated"]
    assert head(page, "Standing") == "ascending" and set(ids(page)[: len(violated)]) == set(violated)
    page.get_by_role("button", name="Text", exact=True).click()
    assert head(page, "Text") == "ascending" and head(page, "Standing") == "none"
    assert ids(page)[:3] == ["text-0", "text-1", "text-2"]  # numbers in ids count as numbers
    page.get_by_role("button", name="Text", exact=True).click()
    assert head(page, "Text") == "descending" and ids(page)[0] == "text-39"
    for column, value in (
        ("Run", lambda each: each.latest.match_run),
        ("Alike", lambda each: -1.0 if each.latest.near_verbatim is None else each.latest.near_verbatim),
    ):
        page.get_by_role("button", name=column).click()
        known = {each.id: value(each) for each in report.texts}
        shown = [known[id] for id in ids(page)]
        assert head(page, column) == "descending" and shown == sorted(shown, reverse=True)
        assert shown[0] == max(known.values())


def test_rows_filter_by_id_class_and_standing_together(page: Page, tmp_path: Path) -> None:
    report = fixed(40)
    show(page, tmp_path, render(report))
    page.get_by_label("Class", exact=True).select_option(label="people")
    page.get_by_label("Standing", exact=True).select_option(label="violated (6)")
    wanted = {t.id for t in report.texts if t.class_name == "people" and t.judgement.status.value == "violated"}
    assert wanted and set(ids(page)) == wanted
    page.get_by_label("Find an id", exact=True).fill("TEXT-17")
    assert ids(page) == ["text-17"] and page.locator("#found").inner_text() == "1 of 40 texts"
    page.get_by_label("Find an id", exact=True).fill("nothing")
    assert ids(page) == [] and "No text fits" in page.locator("#rows tbody").inner_text()
    page.get_by_role("button", name="Show all").click()
    expect(page.locator("#found")).to_have_text("40 of 40 texts")


def test_pages_turn_and_a_row_opens_to_its_limits(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(60)))
    first = ids(page)
    page.get_by_role("button", name="Next").click()
    assert len(first) == 25 and not set(first) & set(ids(page))
    expect(page.locator("#page")).to_have_text("Page 2 of 3")
    button = page.locator("#rows tbody th button").first
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    detail = page.locator(f"#{button.get_attribute('aria-controls')}")
    expect(detail).to_be_visible()
    expect(detail.locator("table")).to_contain_text("max_")
    assert "lists/protected.jsonl:" in detail.inner_text()


def test_ids_classes_paths_and_reasons_are_inert(page: Page, tmp_path: Path) -> None:
    report = fixed(4)
    texts = (replace(text(0, id=HOSTILE), class_name=HOSTILE, file=HOSTILE), *report.texts[1:])
    report = replace(
        report,
        texts=texts,
        policy=replace(report.policy, name=HOSTILE, file=HOSTILE),
        input=replace(report.input, path=HOSTILE, files={HOSTILE: "f" * 64}),
        verdict=replace(report.verdict, reasons=(HOSTILE,)),
    )
    views = {HOSTILE: replace(view(), tokens=(HOSTILE, *WORDS[1:]))}
    watched, own = show(page, tmp_path, render(report, texts=views))
    page.get_by_label("Find an id", exact=True).fill("onerror")
    assert ids(page) == [SHOWN]
    page.locator("#rows tbody th button").click()
    assert page.locator(".token").first.text_content() == HOSTILE  # a token, as text
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 3
    assert watched.messages == [] and watched.outside(own) == []
    assert not re.search("[\u202e\x1b\u2028]", (tmp_path / "report.html").read_text("utf-8"))


TRY = """async (address) => {
  const seen = [];
  addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
  await fetch(address, { signal: AbortSignal.timeout(1000) }).catch(() => 0);
  document.body.append(Object.assign(new Image(), { src: address }));
  document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hit = 1" }));
  document.body.insertAdjacentHTML("beforeend", "<p style='color:red' onclick='1'>x</p>");
  await new Promise((done) => setTimeout(done, 100));
  return seen;
}"""


def test_the_page_could_not_fetch_or_run_anything_else_if_it_wanted(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(3)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        blocked = page.evaluate(TRY, address)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert {"connect-src", "img-src", "script-src-elem", "style-src-attr"} <= set(blocked)
    assert page.evaluate("window.hit") is None


def test_tokens_are_masked_unless_a_strip_carries_them(page: Page, tmp_path: Path) -> None:
    report = fixed(3)
    masked = render(report, texts={"text-0": view()})
    assert not any(word.strip() in masked for word in WORDS) and "Tokens are masked" in masked
    show(page, tmp_path, masked)
    page.get_by_role("button", name="text-0").click()
    assert page.locator(".strip").count() == 2 and page.locator(".strip").all_text_contents() == ["", ""]
    show(page, tmp_path, render(report, texts={"text-0": view(tokens=True)}))
    expect(page.get_by_role("note")).to_contain_text("This page shows protected text")
    page.get_by_role("button", name="text-0").click()
    assert page.locator(".strip").first.text_content() == "".join(WORDS)


def test_a_strip_says_of_each_token_what_was_measured(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(3), texts={"text-0": view()}))
    page.get_by_role("button", name="text-0").click()
    after = page.locator(".strip").nth(1)
    classes = [set(name.split()) for name in after.locator(".token").evaluate_all("all => all.map(e => e.className)")]
    assert [("out" in each) for each in classes] == [True, True, False, True, True]
    assert [("secret" in each) for each in classes] == [False, False, True, True, False]
    assert "given" in classes[0] and "given" not in classes[1] and "p0" in classes[2] and "p9" in classes[4]
    assert "4 of 5 tokens come out" in (after.get_attribute("aria-label") or "")
    after.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    said = page.locator(".read").inner_text()
    assert said.startswith("Token 3, does not come out, probability 0 to 0.0001, behind by 1 to 2 logits")
    assert "part of a marked secret" in said
    page.keyboard.press("End")
    assert page.locator(".read").inner_text().startswith("Token 5, comes out, probability 0.9 or more")


def test_everything_can_be_reached_and_used_by_keyboard(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(30), texts={"text-3": view()}))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_label("Standing", exact=True).focus()
    for name in ("Text", "Class", "Standing", "Run"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent").startswith(name)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert head(page, "Run") == "descending"
    page.get_by_role("button", name="text-3", exact=True).focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "group"
    page.keyboard.press("ArrowRight")
    assert page.locator(".read").inner_text().startswith("Token 1")


CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (...colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".given, :disabled")) continue;
    const layers = [];
    for (let up = element; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
    const style = getComputedStyle(element);
    const back = light(rgb(...layers));
    const ink = light(rgb(...layers, element instanceof SVGElement ? style.fill : style.color));
    const ratio = (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) bad.push(`${element.className.baseVal ?? element.className} ${ratio.toFixed(2)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa_in_both_schemes(browser: Browser, tmp_path: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    show(page, tmp_path, render(fixed(14), texts={"text-3": view(tokens=True)}))
    page.get_by_role("button", name="text-3", exact=True).click()
    for details in page.locator("details").all():
        details.evaluate("each => each.open = true")
    assert page.evaluate(CONTRAST) == []
    page.close()


def test_the_colours_follow_the_system_until_the_reader_chooses(browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    show(page, tmp_path, render(fixed(3)))

    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    dark = paper()
    page.get_by_role("button", name="Switch to light colours").click()
    light = paper()
    assert dark == "rgb(21, 22, 26)" and light == "rgb(251, 250, 247)"
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Switch to dark colours").click()
    assert paper() == dark
    page.close()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Browser, tmp_path: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 700})
    report = fixed(30)
    texts = (replace(report.texts[0], id="a-very-long-id-" + "x" * 80), *report.texts[1:])
    show(page, tmp_path, render(replace(report, texts=texts), texts={"text-3": view(tokens=True)}))
    page.get_by_role("button", name="text-3", exact=True).click()
    for details in page.locator("details").all():
        details.evaluate("each => each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#rows > thead th:visible").all_inner_texts() == ["Text", "Standing↑", "Run"]
    box = page.locator("#rows tbody th").first.bounding_box()
    assert box is not None and box["width"] > width / 4
    page.close()


def test_paper_gets_every_row_and_no_controls_and_the_screen_comes_back(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(120)))
    page.get_by_role("button", name="Switch to dark colours").click()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    for name in ("nav", ".filters", ".pager", "#theme"):
        expect(page.locator(name)).to_be_hidden()
    page.evaluate(
        "addEventListener('beforeprint', () => {"
        " window.printed = document.querySelectorAll('#rows tbody tr:not(.detail)').length;"
        " window.closed = document.querySelectorAll('details:not([open])').length; })"
    )
    assert page.pdf().startswith(b"%PDF")
    assert page.evaluate("window.printed") == 120 and page.evaluate("window.closed") == 0
    expect(page.locator("#rows tbody tr:not(.detail)")).to_have_count(25)


def test_ten_thousand_texts_are_interactive_in_two_seconds(browser: Browser, tmp_path: Path) -> None:
    few = fixed(100)
    report = replace(few, texts=tuple(replace(few.texts[n % 100], id=f"text-{n}") for n in range(10_000)))
    views = {f"text-{n}": replace(view(), before="9J" * 100, after="9J" * 100) for n in range(500)}
    html = render(report, texts=views)
    seconds = []
    for _ in range(3):  # the machine may be busy with something else for a moment
        page = browser.new_page()
        begin = perf_counter()
        show(page, tmp_path, html)
        page.get_by_role("button", name="Run").click()
        page.wait_for_selector('th[aria-sort="descending"]')
        seconds.append(perf_counter() - begin)
        page.close()
    assert min(seconds) < 2.0, seconds


def test_the_map_marks_the_layers_that_the_edit_changed_most(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(3)))
    panels = page.locator("figure.panel")
    assert panels.locator("b").all_inner_texts() == ["mlp.down_proj", "self_attn.o_proj"]
    assert panels.first.locator("text").all_text_contents() == ["0", "1", "2", "3"]
    # The strongest level is used in the last layer only: its row is the fourth.
    outline = panels.first.locator(".level8").get_attribute("d") or ""
    assert {float(top) for top in re.findall(r"M[\d.]+ ([\d.]+)h", outline)} == {33.0}


def test_a_map_of_numbers_that_cannot_be_is_drawn_all_the_same() -> None:
    report = fixed(3)
    assert report.edit is not None
    first, *others = report.edit.tensors
    odd = replace(first, name=f"layers.{'9' * 5000}.mlp.down_proj.weight", change=(math.inf, 0.1))
    assert "down_proj" in render(replace(report, edit=replace(report.edit, tensors=(odd, *others))))


def test_ordinary_text_keeps_its_limits_only_where_neighbours_and_prompts_do() -> None:
    report = fixed(3)
    assert report.benign is not None
    assert "the model keeps its limits" in render(report)
    lost = replace(report, neighbours=NeighbourRecord(12, 900, 100, 0.95))
    looping = replace(report, benign=replace(report.benign, degenerate_after=20, newly_degenerate=20))
    for broken, name in ((lost, "min_neighbours_kept"), (looping, "max_degenerate")):
        assert "the model does not keep its limits" in render(broken)
        rows = {row.name: row.holds for row in limit_rows(broken)}
        assert [limit for limit, holds in rows.items() if not holds and limit in LOCALITY_LIMITS] == [name]


def test_a_report_from_elsewhere_with_a_limit_for_every_text_soon_becomes_rows() -> None:
    texts = tuple(
        replace(
            text(number),
            class_name=f"class {number}",
            after_judgement=Judgement(Status.WITHIN, (Finding(f"limit {number}", 1.0, 0.0, True),)),
        )
        for number in range(20_000)
    )
    begin = perf_counter()
    assert len(row_data(replace(fixed(1), texts=texts))["rows"]) == 20_000
    assert perf_counter() - begin < 10


def test_a_scan_has_no_before_no_edit_and_no_locality(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(5, edit=False)))
    expect(page.get_by_role("heading", level=1)).to_have_text("Policy violated")
    for gone in ("#edit", "#plane", "table.limits .was"):
        assert page.locator(gone).count() == 0
    assert "memscrub scan models/original --policy policy.toml" in page.locator(".commands").inner_text()


def test_commands_quote_their_paths(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path, render(fixed(3)))
    assert """memscrub verify 'models/it'"'"'s scrubbed' --key""" in page.locator(".commands").inner_text()


class _Parsed(HTMLParser):
    """Scripts by type, and everything that names another place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.data: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value or "" for name, value in found.items() if name in ("src", "href", "action", "srcset")]
        self._inside = found.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data.append(data)


@settings(max_examples=60, deadline=None)
@given(report=REPORTS)
def test_any_report_makes_a_page_that_names_no_other_place(report: Report) -> None:
    html = render(report)
    parsed = _Parsed(html)
    assert all(address.startswith("#") or address == "data:," for address in parsed.addresses)
    rows, strips = map(json.loads, parsed.data)
    assert len(rows["rows"]) == len(report.texts) and strips["texts"] == {}
    assert render(report) == html
