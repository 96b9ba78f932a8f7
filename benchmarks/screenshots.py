"""Screenshots of pages, and of figures as pages show them, to be looked at before a release.

    python benchmarks/screenshots.py OUT runs/compare/report.html docs/images/*.png ...

Each file is shown by headless Chromium 390, 800 and 1,400 pixels wide, in light and in dark. Exits
with 1 if a page is wider than the window, and names it.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

WIDTHS, HEIGHT = (390, 800, 1400), 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio")
# a window of Chromium's is 500 pixels wide at least, an iframe is as wide as one likes
FRAME = """<!doctype html><meta name="color-scheme" content="{scheme}">
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<iframe id="page" src="{address}"></iframe>"""
WRAPPED = """<!doctype html><meta name="color-scheme" content="light dark">
<style>body {{ margin: 8px; font: 16px system-ui }} img {{ max-width: 100%; height: auto }}</style>
<p>{name}</p><img alt="" src="{address}">"""
MEASURE = """<script>addEventListener("load", () => {
const root = document.getElementById("page").contentDocument.documentElement;
document.body.dataset.size = `${root.scrollWidth}x${root.scrollHeight}`; });</script>"""


def browser() -> str:
    """The browser to use; exits where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        sys.exit(f"no browser here, tried {', '.join(BROWSERS)}")
    return found


def page_of(file: Path, folder: Path) -> Path:
    """The file itself, or a page that shows the picture that it is."""
    if file.suffix in (".html", ".htm"):
        return file.resolve()
    page = folder / f"{file.stem}.html"
    address = html.escape(file.resolve().as_uri())
    page.write_text(WRAPPED.format(name=html.escape(file.name), address=address))
    return page


def chromium(scheme: str, *arguments: str) -> str:
    """Run the browser in a color scheme; returns what it prints."""
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    command = [browser(), *FLAGS, *dark, "--allow-file-access-from-files", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def shoot(page: Path, name: str, width: int, scheme: str, out: Path, folder: Path) -> bool:
    """A screenshot of a whole page; returns whether the page is as narrow as its window."""
    frame = folder / "frame.html"
    address = html.escape(page.as_uri())
    size = {"scheme": scheme, "width": width, "address": address}
    frame.write_text(FRAME.format(height=HEIGHT, **size) + MEASURE)
    told = chromium(scheme, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri())
    found = re.search(r'data-size="([0-9]+)x([0-9]+)"', told)
    across, down = map(int, found.groups()) if found else (width, HEIGHT)
    frame.write_text(FRAME.format(height=down, **size))
    path = out / f"{name}-{width}-{scheme}.png"
    chromium(scheme, f"--screenshot={path}", f"--window-size={max(width, 500)},{down}",
             frame.as_uri())  # fmt: skip
    print(path)
    return across <= width


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the screenshots")
    parser.add_argument("files", type=Path, nargs="+", help="pages and pictures")
    asked = parser.parse_args(args)
    asked.out.mkdir(parents=True, exist_ok=True)
    wide = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in asked.files:
            page = page_of(file, folder)
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    if not shoot(page, file.stem, width, scheme, asked.out, folder):
                        wide.append(f"{file} is wider than {width} pixels ({scheme})")
    print("\n".join(wide) or "no page is wider than its window")
    sys.exit(bool(wide))


if __name__ == "__main__":
    main()
