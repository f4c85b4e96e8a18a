"""A real Chromium for the tests of pages."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from needs import needs
from playwright.sync_api import sync_playwright

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def browser():
    path = needs("chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET)
        try:
            yield chromium
        finally:
            chromium.close()
    for thread in threading.enumerate():  # asyncio's, which waited for Playwright's driver to end
        if thread.name.startswith("asyncio-waitpid"):
            thread.join(10)
