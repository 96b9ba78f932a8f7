"""What reports on partition experiments show beside what all do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from oversight_rl.experiments.partition.evaluation import CONSTANT, WHOLE
from oversight_rl.reports.colors import INK
from oversight_rl.reports.figures import (
    IMPROVEMENT,
    SCORES,
    draw_levels,
    legend_above,
    new_panels,
)
from oversight_rl.reports.gather import Found, Part, Report

SHOWN = {
    "own_error": "error on its own group",
    "foreign_error": "error on other groups",
    "leakage": "leakage",
}


def columns(found: Found, rows: pd.DataFrame) -> dict[str, Any]:
    """Columns of the summary: what parts know of their own and of other groups."""
    return {name: rows[name].mean() for name in (*SHOWN, "p_own_class", "p_foreign_class")}


def certificates(found: Found) -> Figure:
    """Certificates of the parts and leakage by share of labels, between whole code and constant."""
    figure, panels = new_panels(len(SHOWN), len(SHOWN), 3.8, 3.4)
    for axes, (name, title) in zip(panels, SHOWN.items(), strict=True):
        for i, method in enumerate(found.names):
            shift = 1.04 ** (i - (len(found.names) - 1) / 2)
            draw_levels(found, axes, method, name, shift)
        for who in (WHOLE, CONSTANT):
            level = found.results[found.results["policy"] == who][name].mean()
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(who, (0.01, level), (0, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
        axes.set_xlabel("share of images that are labeled")
        axes.set_title(title)
    legend_above(figure, panels)
    return figure


PARTS = (
    replace(
        SCORES,
        title="Gap against share of labels",
        caption="How much worse a part's fresh decoder restores other groups than the part's own, "
        "averaged over parts: interquartile mean over seeds, 95% interval, every seed as a dot.",
    ),
    Part(
        "certificates",
        "What parts know",
        "Mean absolute error in [-1, 1] of fresh decoders that see one part, on held-out images; "
        "leakage is 0 where a part tells no more of other groups than a constant, and 1 where it "
        "tells as much as the whole code. Dashed: the whole code, averaged over all methods, and "
        "the best constant.",
        certificates,
    ),
    IMPROVEMENT,
)
REPORT = Report(
    PARTS,
    columns,
    score="gap",
    about="Mean absolute error of a part's fresh decoder on images of other groups, less that on "
    "the part's own.",
    reference="routed",
)
