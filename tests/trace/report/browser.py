"""A browser for tests: Chromium without a window and without a network."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def open_browser() -> Iterator:
    """A browser context of a laptop's screen; what a page logs as error, and what it asks the network for, fails."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(BROWSERS)})")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            context = browser.new_context(viewport={"width": 1366, "height": 768}, accept_downloads=True)
            context.set_default_timeout(10_000)
            context.route(lambda url: not url.startswith(("file:", "data:", "blob:")), lambda route: route.abort())
            yield context
        finally:
            browser.close()


def open_page(context, path: Path):
    """The page of a file, and the list of errors that it logs from then on."""
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"asked for {request.url}"))
    page.goto(path.as_uri())
    return page, errors
