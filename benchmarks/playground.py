"""Make what the documentation shows of the playground, from the default run.

`python benchmarks/playground.py` trains it, writes docs/playground.html and films that page, in a
headless Chromium, as docs/images/playground.gif; `--run DIR` takes a run that is there.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from contextlib import chdir
from pathlib import Path

from browser import Browser
from PIL import Image

from oversight_rl import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE, FILM = ROOT / "docs/playground.html", ROOT / "docs/images/playground.gif"
WIDTH, HEIGHT, SCALE = 1120, 690, 0.75  # of what is filmed, in the page's pixels
STILL, STEP, END = 1600, 300, 1300  # milliseconds
SCENES = 4  # steps of the page's tour
COLORS = 128


def write(run: Path | None) -> None:
    """The page, of a run that is called runs/x, as in the README."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.mkdir("runs")
        if run is None:
            cli.train(["--run-dir", "runs/x"])
        else:
            Path("runs/x").symlink_to(run)
        cli.main(["play", "runs/x", "--out", str(PAGE)])


def film() -> None:
    """Each step of the tour: what it says, then an episode on all boards."""
    frames: list[Image.Image] = []
    times: list[int] = []
    with Browser(WIDTH, HEIGHT) as browser:

        def shoot(time: int) -> None:
            picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
            frames.append(picture)
            times.append(time)

        browser.resize(WIDTH, HEIGHT, SCALE)
        browser.prefer(color_scheme="light", reduced_motion="reduce")
        browser.open(PAGE)
        browser.run("document.documentElement.style.overflow = 'hidden'")  # no scroll bar
        browser.run("$('try').scrollIntoView()")
        browser.wait("sums")
        for scene in range(SCENES):
            browser.run(f"document.querySelectorAll('#tour button')[{scene}].click()")
            browser.wait("!$('story').textContent.startsWith('Looking')")
            shoot(STILL)
            browser.run(f"acts = newActs(); var random = uniform({scene}); 0")
            over = False
            while not over:
                over = browser.run(
                    "(() => { const u = random(); for (const act of acts) if (!act.ending) {"
                    " step(act, u); act.part.board.follow(act.path, act.ending); }"
                    " return acts.every(({ ending }) => ending); })()"
                )
                shoot(END if over else STEP)
            browser.run("stopEpisode()")
    palette = frames[0].quantize(COLORS)  # one for all: frames share their colors
    first, *others = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    first.save(FILM, save_all=True, append_images=others, duration=times, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished default run, to take instead")
    run = parser.parse_args().run
    write(run.resolve() if run else None)
    film()
    for path in (PAGE, FILM):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
