"""How soon a page of many texts can be used: python benchmarks/html_speed.py

Prints, per number of texts, the time to make the page, its size, and from opening it in headless Chromium until its
rows are shown, until a sort by another column is done, and until a search is done; the median of five. Texts are made
up, 500 of them with token strips of 100 tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import Browser

from memscrub.faces.html_report import render
from memscrub.faces.html_tokens import TokenView
from memscrub.reports.report import Report
from tests.browser import started
from tests.reports import fixed

VIEW = TokenView(1, "9J" * 100, "9J7H2b3C" * 25, judged=1)
TIMES = 5


def many(count: int) -> Report:
    """A fix of so many texts, made from a hundred."""
    few = fixed(100)
    return replace(few, texts=tuple(replace(few.texts[n % 100], id=f"text-{n}") for n in range(count)))


def make(file: Path, count: int) -> None:
    """The page of so many texts."""
    views = {f"text-{n}": VIEW for n in range(min(count, 500))}
    file.write_text(render(many(count), texts=views), encoding="utf-8")


def timed(action: Callable[[], object]) -> float:
    begin = perf_counter()
    action()
    return perf_counter() - begin


def once(browser: Browser, address: str) -> tuple[float, float, float]:
    """Seconds until rows are shown, until they are sorted, until they are searched."""
    page = browser.new_page()

    def opened() -> None:
        page.goto(address)
        page.wait_for_selector("html[data-ready]")

    def sort() -> None:
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_selector('th[aria-sort="descending"]')

    def search() -> None:
        page.locator("#search").fill("text-77")
        page.wait_for_function("document.querySelector('#rows tbody bdi').textContent.startsWith('text-77')")

    seconds = timed(opened), timed(sort), timed(search)
    page.close()
    return seconds


def main() -> None:
    print("| texts | make the page | size | shown | sorted | searched |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, started() as browser:
        for count in (100, 1_000, 10_000):
            file = Path(folder) / "report.html"
            made = timed(partial(make, file, count))
            runs = [once(browser, file.as_uri()) for _ in range(TIMES)]
            shown, sort, search = (median(column) for column in zip(*runs, strict=True))
            size = file.stat().st_size / 2**20
            print(f"| {count:,} | {made:.2f} s | {size:.1f} MiB | {shown:.2f} s | {sort:.2f} s | {search:.2f} s |")


if __name__ == "__main__":
    main()
