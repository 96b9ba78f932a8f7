"""What reports on unlearning show beside what all do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from oversight_rl.reports.figures import (
    IMPROVEMENT,
    SCORES,
    draw_levels,
    hover,
    label_lines,
    new_panels,
    one_scale,
    style,
)
from oversight_rl.reports.gather import Found, Part, Report, percent
from oversight_rl.reports.statistics import iqm
from oversight_rl.reports.tables import means

KNOWS, NEVER_SAW = "base", "perfect_filter"  # between them lies the gap
LOSS = "nats a word"


def gap(found: Found) -> tuple[float, float] | None:
    """Mean forget losses of what knows the topic and of what never saw it, over all their runs."""
    ends = [
        found.deployed.loc[found.deployed["method"] == method, "forget_loss"].mean()
        for method in (KNOWS, NEVER_SAW)
    ]
    return (ends[0], ends[1]) if np.isfinite(ends).all() and ends[0] < ends[1] else None


def columns(found: Found, rows: pd.DataFrame) -> dict[str, float]:
    """The share of the gap that is forgotten, and the mean of each figure."""
    ends = gap(found)
    lost = rows["forget_loss"].mean()
    share = (lost - ends[0]) / (ends[1] - ends[0]) if ends else np.nan
    return {"share_of_gap": share} | means(found, rows)


def absorption(found: Found) -> Figure:
    """Forget and retain losses, and relearning, by how much is labeled."""
    titles = {
        "forget_loss": "the topic to forget (more is forgotten)",
        "retain_loss": "the other topics (less is better)",
        "relearned_16": "the topic to forget, relearned from 16 stories",
    }
    figure, panels = new_panels(len(titles), 2, 5.2, 3.6)
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        for i, name in enumerate(found.names):
            draw_levels(found, axes, name, what, shift=1.02 ** (i - len(found.names) / 2))
        axes.set_title(title)
        axes.set_xlabel("share of the stories that is labeled")
        axes.set_ylabel(LOSS)
        label_lines(axes)
    return figure


def relearning(found: Found) -> Figure | None:
    """Forget loss while it is relearned, a panel for each level and number of stories."""
    steps = found.results["policy"].str.extract(r"^relearned=(\d+),step=(\d+)$").astype(float)
    rows = found.results.assign(count=steps[0], step=steps[1]).dropna(subset=["step"])
    if rows.empty:
        return None
    counts = sorted(rows["count"].unique())
    drawn = list(product(found.levels, counts))
    figure, panels = new_panels(len(drawn), len(counts), 3.9, 2.6)
    for axes, (level, count) in zip(panels, drawn, strict=True):
        here = rows[(rows["level"] == level) & (rows["count"] == count)]
        for name in found.names:
            own = here[here["name"] == name]
            table = own.pivot_table(values="forget_loss", index="step", columns="run").dropna()
            if table.empty:
                continue
            x, middle = table.index.to_numpy(float), iqm(table.to_numpy(float))
            look = style(found, name) | {"markersize": 3}
            (line,) = axes.plot(x, middle, **look, label=name)
            hover(line, *(f"{name}, step {a:.0f}: {b:.3f}" for a, b in zip(x, middle, strict=True)))
        axes.set_title(f"{percent(level)} labeled, {count:.0f} stories", fontsize=8)
        axes.set_xlabel("steps of relearning")
        axes.set_ylabel(LOSS)
    one_scale(panels)
    for axes in panels:
        label_lines(axes)
    return figure


def topics(found: Found) -> pd.DataFrame:
    """Loss on each topic, by method and level, next to the floor."""
    losses = [column for column in map(str, found.deployed) if column.startswith("loss_")]
    table = found.deployed.groupby(["name", "level"], sort=False)[losses].mean().reset_index()
    shown = {"method": table["name"], "labeled": table["level"].map(percent)}
    shown |= {
        c.removeprefix("loss_").replace("_", " "): table[c].map("{:.3f}".format) for c in losses
    }
    return pd.DataFrame(shown)


REPORT = Report(
    (
        Part(
            "absorption",
            "Forgetting against the share of labels",
            "Losses of the deployed model, after ablation and a short tuning on retain stories: "
            "interquartile mean over seeds, 95% interval, every seed as a dot. What a filter "
            "misses is learned; what routing misses goes, in part, where labeled stories of its "
            "topic went, and leaves with it (absorption).",
            absorption,
        ),
        Part(
            "relearning",
            "Relearning",
            "Loss on the topic to forget while a model learns from a few stories on it, and as "
            "many on others: interquartile mean over seeds. What was only hidden comes back at "
            "once.",
            relearning,
        ),
        SCORES,
        Part("topics", "Loss on each topic", "Of the deployed model, mean over seeds.", topics),
        IMPROVEMENT,
    ),
    columns,
    score="forgetting",
    about="Forgetting: loss on the topic to forget less that on the others, in nats for each word; "
    "0 is a model that knows both alike, or neither. What comes back at once, relearning "
    "shows, not this.",
    reference="base",
    question="Which method makes a language model forget a topic, and nothing else, if only a "
    "share of the stories is labeled?",
)
