"""Make what the documentation shows, anew: the playground's page, films and stills.

    python benchmarks/pictures.py [NAME...] [--run DIR] [--minigrid DIR]

It trains the default run, and that of configs/minigrid.yaml, or takes runs that are there, and
shows pages in a headless Chromium. Names are `agent` (docs/images/policies.png, policies_dark.png
and rollouts.gif), `minigrid` (minigrid.gif), `playground` (docs/playground.html, playground.gif),
`tensorboard` (tensorboard.png) and `report` (report.png, of docs/results/report.html); all of them
by default.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from browser import Browser
from PIL import Image

from oversight_rl import cli

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs/images"
PAGE, FILM = ROOT / "docs/playground.html", IMAGES / "playground.gif"
REPORT = ROOT / "docs/results/report.html"
NAMES = "agent", "minigrid", "playground", "tensorboard", "report"
WIDTH, HEIGHT, SCALE = 1120, 690, 0.75  # of what is filmed, in the page's pixels
STILL, STEP, END = 1600, 300, 1300  # milliseconds
SCENES = 4  # steps of the page's tour
COLORS = 128
PATIENCE, SETTLED = 60.0, 12.0  # seconds; TensorBoard says nowhere that it is ready


def run_of(given: Path | None, *flags: str) -> Path:
    """A run that is there, or one that is trained now, called runs/x, as in the README."""
    run = Path("runs/x")
    shutil.rmtree("runs", ignore_errors=True)
    run.parent.mkdir()
    if given is None:
        cli.train([*flags, "--run-dir", str(run)])
    else:
        shutil.copytree(given, run)
    return run


def draw(run: Path, to: dict[str, str]) -> None:
    """What `evaluate --pictures` draws, by name, under the documentation's names."""
    cli.main(["evaluate", str(run), "--pictures", "drawn"])
    for name, own in to.items():
        shutil.copy(f"drawn/{name}", IMAGES / own)


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


def tensorboard(run: Path) -> None:
    """The first screen of the custom scalars."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent)]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + PATIENCE
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > until:
                raise TimeoutError("TensorBoard does not answer")
            time.sleep(0.2)
        time.sleep(SETTLED)  # until it has read the run
        with Browser() as browser:
            browser.resize(1250, 835, 0.8)
            browser.prefer(color_scheme="light", reduced_motion="reduce")
            browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/#custom_scalars")
            time.sleep(SETTLED)
            (IMAGES / "tensorboard.png").write_bytes(browser.screenshot())
    finally:
        server.terminate()
        server.wait()


def report() -> None:
    """The first screen of the committed report."""
    with Browser(1280, 800) as browser:
        browser.resize(1280, 1180, SCALE)
        browser.prefer(color_scheme="light")
        browser.send("Page.navigate", url=REPORT.as_uri())
        browser.wait("document.querySelector('.rank') && document.readyState == 'complete'")
        browser.run("document.documentElement.style.overflow = 'hidden'")
        (IMAGES / "report.png").write_bytes(browser.screenshot())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--run", type=Path, help="a finished default run, to take instead")
    parser.add_argument("--minigrid", type=Path, help="a finished run in MiniGrid, likewise")
    given = parser.parse_args()
    names = set(given.names or NAMES)
    if strange := names - set(NAMES):
        parser.error(f"names must be of {', '.join(NAMES)}, got {strange.pop()}")
    paths = [path.resolve() if path else None for path in (given.run, given.minigrid)]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        if "minigrid" in names:
            run = run_of(paths[1], "--config", "minigrid")
            draw(run, {"rollouts.gif": "minigrid.gif"})
        if names & {"agent", "playground", "tensorboard"}:
            run = run_of(paths[0])
        if "agent" in names:
            drawn = "policies.png", "policies_dark.png", "rollouts.gif"
            draw(run, {name: name for name in drawn})
        if "playground" in names:
            cli.main(["play", str(run), "--out", str(PAGE)])
            film()
        if "tensorboard" in names:
            tensorboard(run)
    if "report" in names:
        report()
    for path in (PAGE, *sorted(IMAGES.iterdir())):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
