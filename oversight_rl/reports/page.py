"""The report itself: one page, a table and figures, from the run folders below a directory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
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
from oversight_rl.reports.statistics import iqm
from oversight_rl.reports.svg import Drawing, drawing
from oversight_rl.reports.tables import ranked, summary
from oversight_rl.reports.verdict import Verdict, verdict
from oversight_rl.terminal import fixed

SHOWN = ("play.html", "pictures/rollouts.gif", "pictures/policies.png")
"""What a run folder may hold to look at, in the order of links."""


@dataclass(frozen=True)
class Page:
    """A page of a report."""

    file: str
    panel: str
    """The value of the setting that pages differ in."""
    found: Found
    verdict: Verdict


def write(directory: Path) -> list[Page]:
    """Write report.html, summary.csv and figures/ from the runs below a directory, into it.

    Where runs differ in the setting that an experiment has a page for each value of, the others
    are report-VALUE.html, with figures of their own.

    Returns what was found, with what is missing, and the verdict of each page.
    """
    every = gather(directory)
    pages: list[Page] = []
    for panel, found in every.split().items():
        file = f"report-{panel}.html" if pages else "report.html"
        pages.append(Page(file, panel, found, verdict(found)))
    tables = {page.panel: summary(page.found) for page in pages}
    with writing(directory):
        for page in pages:
            figures = directory / "figures" / ("" if page is pages[0] else page.panel)
            figures.mkdir(exist_ok=True, parents=True)
            parts = (HEADLINE, *page.found.report.parts)
            drawn = [(part, _draw(part, page.found, figures)) for part in parts]
            text = _page(page, pages, tables[page.panel], drawn, directory)
            write_atomically(directory / page.file, text.encode())
        if len(pages) > 1:
            named = [table.assign(**{str(every.kind.panel): p}) for p, table in tables.items()]
            whole = pd.concat(named, ignore_index=True)
        else:
            (whole,) = tables.values()
        write_atomically(directory / "summary.csv", whole.to_csv(index=False).encode())
    return pages


def best_of(pages: Sequence[Page]) -> dict[str, dict[str, str]]:
    """The best method of each class of assumptions on each page, and its score by level."""
    found: dict[str, dict[str, str]] = {}
    for page in pages:
        for assumed, names in ranked(page.found).items():
            scores = [page.found.samples(names[0], level) for level in page.found.levels]
            said = " / ".join(fixed(float(iqm(x)), ".2f") if len(x) else "none" for x in scores)
            found.setdefault(assumed, {})[page.panel] = f"{names[0]}: {said}"
    return found


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
    page: Page,
    pages: Sequence[Page],
    table: pd.DataFrame,
    drawn: Sequence[Any],
    directory: Path,
) -> str:
    found, outcome = page.found, page.verdict
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
        page=page,
        pages=pages,
        best_of=best_of(pages),
        headline=drawn[0],
        drawn=[(part, content) for part, content in drawn[1:] if content is not None],
        runs={key: [_links(directory, where) for where in own] for key, own in runs.items()},
        cost=table.groupby("method", sort=False)[["env_steps", "wall_seconds"]].mean().T.to_dict(),
    )
