"""Debian's Chromium for tests of pages: where it is, started without a window, its network watched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright


def chromium() -> str:
    """The browser's program; a test that finds none fails."""
    found = os.environ.get("MEMSCRUB_CHROMIUM") or shutil.which("chromium")
    assert found, "no Chromium was found: apt-get install chromium, or name the program in MEMSCRUB_CHROMIUM."
    return found


@contextmanager
def started() -> Iterator[Browser]:
    """A browser without a window; its own sandbox needs rights that a container's root has not."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """What a page does that it should not: messages on the console, errors, and what it asks a network for."""

    def __init__(self, page: Page) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def outside(self, own: str) -> list[str]:
        """Every address that was asked for beside the page's own file and data in the page."""
        return [url for url in self.requests if url != own and not url.startswith("data:")]
