"""The report itself: one page, a table and figures, from the run folders below a directory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib as mpl
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from oversight_rl.files import as_text, write_atomically, writing
from oversight_rl.reports.colors import FAMILIES, INK
from oversight_rl.reports.figures import HEADLINE, STYLE, look
from oversight_rl.reports.gather import Found, Part, gather, percent
from oversight_rl.reports.svg import Drawing, drawing
from oversight_rl.reports.tables import ranked, summary
from oversight_rl.reports.verdict import Verdict, verdict
from oversight_rl.terminal import fixed

SHOWN = ("play.html", "pictures/rollouts.gif", "pictures/policies.png")
"""What a run folder may hold to look at, in the order of links."""


def write(directory: Path) -> tuple[Found, Verdict]:
    """Write report.html, summary.csv and figures/ from the runs below a directory, into it.

    Returns what was found, with what is missing; and the verdict.
    """
    found = gather(directory)
    table = summary(found)
    outcome = verdict(found)
    parts = (HEADLINE, *found.report.parts)
    with writing(directory):
        (directory / "figures").mkdir(exist_ok=True)
        drawn = [(part, _draw(part, found, directory / "figures")) for part in parts]
        write_atomically(directory / "summary.csv", table.to_csv(index=False).encode())
        page = _page(found, table, outcome, drawn, directory)
        write_atomically(directory / "report.html", page.encode())
    return found, outcome


def _draw(part: Part, found: Found, folder: Path) -> Drawing | pd.DataFrame | None:
    """A table, or a figure, with files of it; what an older report left there goes."""
    vector, raster = folder / f"{part.name}.svg", folder / f"{part.name}.png"
    for path in (vector, raster):
        path.unlink(missing_ok=True)
    png = io.BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": part.name}):
        figure = part.draw(found)
        if not isinstance(figure, Figure):
            return figure
        drawn = drawing(figure, part.name, part.title, part.caption)
        figure.savefig(png, format="png", dpi=110, facecolor="white")
    write_atomically(vector, drawn.whole.encode())
    write_atomically(raster, png.getvalue())
    return drawn


def _inline(svg: str) -> Markup:
    """An SVG in the page's colors, which are lighter where it is dark."""
    for color in FAMILIES:
        svg = svg.replace(color, _variable(color))
    return Markup(svg.replace(INK, "currentColor"))


def _variable(color: str) -> str:
    """A color of methods as the page's style has it."""
    return f"var(--c{color[1:]})"


def _links(directory: Path, where: str) -> dict[str, str]:
    """Addresses of a run folder and of what can be looked at in it, by what they are called."""
    found = {where.rpartition("/")[2] or where: f"./{quote(where)}/"}
    for name in SHOWN:
        path = directory / where / name
        if path.is_file() and not path.is_symlink():
            found[Path(name).stem] = f"./{quote(where)}/{name}"
    return found


def _page(
    found: Found, table: pd.DataFrame, outcome: Verdict, drawn: Sequence[Any], directory: Path
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "percent": percent,
        "number": lambda value, digits=2: fixed(value, f".{digits}f"),
        "inline": _inline,
        "variable": _variable,
    }
    source = files("oversight_rl").joinpath("data/report.html.j2").read_text()
    leads = table.groupby(["assumes", "train_oversight"])["iqm"].transform("max") == table["iqm"]
    rows = table.assign(leads=leads).to_dict("records")
    cells = {(row["method"], row["train_oversight"]): row for row in rows}
    runs = found.deployed.sort_values("seed").groupby(["name", "level"])["run"].apply(list)
    return environment.from_string(source).render(
        title=as_text(directory.resolve().name),
        found=found,
        methods={name: found.kind.methods[method] for name, method in found.methods.items()},
        deploys=found.deployed.groupby("name")["policy"].first(),
        families=FAMILIES,
        ids={name: i for i, name in enumerate(found.names)},
        looks={name: look(found, name) for name in found.names},
        cells=cells,
        best=table.groupby("train_oversight")["iqm"].max(),
        ranked=ranked(found),
        outcomes=outcome.grid.set_index("method").to_dict("index"),
        verdict=outcome,
        headline=drawn[0],
        drawn=[(part, content) for part, content in drawn[1:] if content is not None],
        runs={key: [_links(directory, where) for where in own] for key, own in runs.items()},
        cost=table.groupby("method", sort=False)[["env_steps", "wall_seconds"]].mean().T.to_dict(),
    )
