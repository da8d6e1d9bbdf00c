"""Pages in a real headless Chromium, without a network."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

INKED = """() => {
  const inside = (node) => [...(node.shadowRoot ? [node.shadowRoot] : []), ...(node.children || [])]
  const canvases = (node) => inside(node).flatMap((one) => one.tagName == "CANVAS" ? [one] : canvases(one))
  const colors = (canvas) => {
    if (canvas.width == 0 || canvas.height == 0) return 0
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    const found = new Set()
    for (let i = 0; i < data.length; i += 4)
      if (data[i + 3] > 128) found.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2])
    return found.size
  }
  return Object.fromEntries([...document.querySelectorAll(".chart")].map(
    (chart) => [chart.dataset.title, Math.max(0, ...canvases(chart).map(colors))]))
}"""
"""Number of colors in the largest canvas of each chart: text, grid and what is drawn."""


class Opened:
    """A page.

    Attributes:
        page: playwright's.
        errors: messages of the console that are errors or warnings, failed requests, and exceptions.
    """

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(f"request: {request.url[:200]}"))

    def colors(self) -> dict[str, int]:
        """Colors in each chart, by title."""
        return self.page.evaluate(INKED)

    def hangs_over(self) -> int:
        """CSS pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@contextlib.contextmanager
def opened(path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Opened]:
    """Open a file; skips the test without Chromium, which Debian has as `chromium`."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs a Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, has_touch=width < 600
            )
            found = Opened(context.new_page())
            found.page.goto(path.absolute().as_uri())
            found.page.wait_for_selector("html[data-ready]", timeout=60_000)
            found.page.wait_for_function("Bokeh.documents.every((one) => one.is_idle)", timeout=60_000)
            yield found
        finally:
            browser.close()
