"""The report itself: one page, a table and figures, from the run folders below a directory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from oversight_rl.agents.methods import METHODS
from oversight_rl.files import as_text, write_atomically, writing
from oversight_rl.reports.figures import CAPTIONS, INK, color, figures
from oversight_rl.reports.gather import Found, gather
from oversight_rl.reports.tables import percent, reward_models, summary, verdict


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def write(directory: Path) -> tuple[Found, str]:
    """Write report.html, summary.csv and figures/ from the runs below a directory, into it.

    Returns:
        What was found, with what is missing; and the verdict.

    Raises:
        UserError: there is no finished run, or the directory cannot be written.
    """
    found = gather(directory)
    table = summary(found)
    sentence = verdict(found, table)
    drawn = []
    with writing(directory):
        (directory / "figures").mkdir(exist_ok=True)
        for name, kind in itertools.product(CAPTIONS, ("svg", "png")):
            (directory / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
        for name, figure in figures(found):
            svg = _svg(figure)
            write_atomically(directory / "figures" / f"{name}.svg", svg.encode())
            write_atomically(directory / "figures" / f"{name}.png", _png(figure))
            inline = svg[svg.index("<svg") :].replace(INK, "currentColor")
            drawn.append((*CAPTIONS[name], Markup(inline)))
        write_atomically(directory / "summary.csv", table.to_csv(index=False).encode())
        page = _page(found, table, sentence, drawn, as_text(directory.resolve().name))
        write_atomically(directory / "report.html", page.encode())
    return found, sentence


def _page(
    found: Found, table: pd.DataFrame, sentence: str, drawn: Sequence[Any], title: str
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = percent
    source = files("oversight_rl").joinpath("data/report.html.j2").read_text()
    cells = {(row["method"], row["train_oversight"]): row for row in table.to_dict("records")}
    return environment.from_string(source).render(
        title=title,
        found=found,
        methods={name: METHODS[found.method(name)] for name in found.names},
        colors={name: color(found, name) for name in found.names},
        cells=cells,
        best={
            level: max(
                (row["iqm"] for row in cells.values() if row["train_oversight"] == level), default=0
            )
            for level in found.levels
        },
        verdict=sentence,
        figures=drawn,
        reward_models=reward_models(found),
        runs=len(found.deployed),
        cost=table.groupby("method", sort=False)[["env_steps", "wall_seconds"]].mean().T.to_dict(),
        optimum=float(found.deployed["optimal_return"].max()),
    )
