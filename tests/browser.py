"""Real Chromium over a page: what it asks the network for, what it logs, and what axe finds wrong."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Seen:
    """A page that is open."""

    page: Any
    requests: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    """Console messages and uncaught errors."""

    def faults(self) -> list[tuple[str, str]]:
        """What axe finds against WCAG and its own best practices, as ``(rule, first place)``."""
        from axe_playwright_python.sync_playwright import Axe

        return [(found["id"], found["nodes"][0]["html"]) for found in Axe().run(self.page).response["violations"]]


@contextmanager
def opened(address: object, *, width: int = 1240, dark: bool = False, **context: Any) -> Iterator[Seen]:
    """A page in headless Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
    pytest.importorskip("axe_playwright_python", reason="no axe: pip install '.[test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine; Debian's package is chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        place = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", **context
        )
        seen = Seen(place.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.logs.append(message.text))
        seen.page.on("pageerror", lambda error: seen.logs.append(str(error)))
        seen.page.goto(str(address) if "://" in str(address) else f"file://{address}")
        yield seen
        browser.close()
