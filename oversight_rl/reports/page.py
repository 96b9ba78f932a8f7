"""The report itself: one page, a table and figures, from the run folders below a directory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from oversight_rl.files import as_text, write_atomically, writing
from oversight_rl.reports.figures import INK, STYLE, color
from oversight_rl.reports.gather import Found, Part, gather, percent
from oversight_rl.reports.tables import summary
from oversight_rl.reports.verdict import Verdict, verdict


def write(directory: Path) -> tuple[Found, Verdict]:
    """Write report.html, summary.csv and figures/ from the runs below a directory, into it.

    Returns what was found, with what is missing; and the verdict.
    """
    found = gather(directory)
    table = summary(found)
    outcome = verdict(found)
    with writing(directory):
        (directory / "figures").mkdir(exist_ok=True)
        drawn = [(part, _draw(part, found, directory / "figures")) for part in found.report.parts]
        write_atomically(directory / "summary.csv", table.to_csv(index=False).encode())
        page = _page(found, table, outcome, drawn, as_text(directory.resolve().name))
        write_atomically(directory / "report.html", page.encode())
    return found, outcome


def _draw(part: Part, found: Found, folder: Path) -> Markup | pd.DataFrame | None:
    """A table, or a figure as SVG, with files of it; what an older report left there goes."""
    vector, raster = folder / f"{part.name}.svg", folder / f"{part.name}.png"
    for path in (vector, raster):
        path.unlink(missing_ok=True)
    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": part.name}):
        drawn = part.draw(found)
        if not isinstance(drawn, Figure):
            return drawn
        drawn.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        drawn.savefig(png, format="png", dpi=110, facecolor="white")
    write_atomically(vector, svg.getvalue().encode())
    write_atomically(raster, png.getvalue())
    inline = svg.getvalue()
    return Markup(inline[inline.index("<svg") :].replace(INK, "currentColor"))


def _page(
    found: Found, table: pd.DataFrame, outcome: Verdict, drawn: Sequence[Any], title: str
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = percent
    source = files("oversight_rl").joinpath("data/report.html.j2").read_text()
    cells = {(row["method"], row["train_oversight"]): row for row in table.to_dict("records")}
    return environment.from_string(source).render(
        title=title,
        found=found,
        methods={name: found.kind.methods[method] for name, method in found.methods.items()},
        deploys=found.deployed.groupby("name")["policy"].first(),
        colors={name: color(found, name) for name in found.names},
        cells=cells,
        best=table.groupby("train_oversight")["iqm"].max(),
        verdict=outcome,
        drawn=drawn,
        cost=table.groupby("method", sort=False)[["env_steps", "wall_seconds"]].mean().T.to_dict(),
    )
