"""One page with the agents of runs inside: no server, no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from oversight_rl.agents.threads import on_threads
from oversight_rl.envs.settings import UserError
from oversight_rl.files import as_text, write_atomically, writing
from oversight_rl.playground.gather import run_of
from oversight_rl.runs.folder import open_runs

PAGE = "play.html"
MOST_RUNS = 16  # of a page
MOST_HISTORIES = 4  # runs of a page whose training is in it; of more, only the end


def write(paths: Sequence[Path], out: Path) -> None:
    """Write a page of the runs at these paths, each of a run, or of a run per seed."""
    folders = [folder for path in paths for folder in open_runs(path)]
    if len(folders) > MOST_RUNS:
        raise UserError(f"a page holds {MOST_RUNS} runs at most, got {len(folders)}")
    with on_threads(1):  # networks are small, and threads that wait for each other crawl
        runs = [run_of(folder, history=len(folders) <= MOST_HISTORIES) for folder in folders]
    for i, run in enumerate(runs):  # runs that are alike but for settings are told apart by folder
        if any(run["name"] == other["name"] for other in runs[:i]):
            run["name"] += f" ({as_text(folders[i].path.name)})"
    page = render(runs, as_text(paths[0].absolute().name))
    with writing(out):
        write_atomically(out, page.encode())


def render(runs: Sequence[object], title: str) -> str:
    """The page, from what `run_of` tells."""
    web = files("oversight_rl.playground") / "web"
    source = {path.name: path.read_text(encoding="utf-8") for path in web.iterdir()}
    style, core, worker = source["style.css"], source["core.js"], source["worker.js"]
    app = "".join(source[name] for name in ("board.js", "app.js", "parts.js"))
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(core)} {_hash(app)}",
            f"style-src {_hash(style)}",
            "worker-src blob:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    data = json.dumps({"runs": runs}, allow_nan=False).replace("<", "\\u003c")
    filled = {"style": style, "core": core, "worker": worker, "app": app, "data": data}
    filled |= {"title": html.escape(title), "policy": policy}
    # each place once, so that nothing within what is filled in is taken for one
    return re.sub(r"\{\{ (\w+) \}\}", lambda place: filled[place[1]], source["page.html"])


def _hash(text: str) -> str:
    """What a content security policy allows to run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
