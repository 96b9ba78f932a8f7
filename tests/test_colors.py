"""Colors: told apart by people who see no red and green, readable on light and dark pages."""

import re
from importlib.resources import files
from itertools import combinations

import matplotlib
import numpy as np
import pytest

from oversight_rl.agents.methods import METHODS
from oversight_rl.envs import render
from oversight_rl.reports import colors

# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color
# vision deficiency", deuteranopia (severity 1), of linear RGB
DEUTERANOPIA = np.array([
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
])  # fmt: skip
TO_XYZ = np.array([  # of linear sRGB, IEC 61966-2-1
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
WHITE = TO_XYZ.sum(1)
APART = 18  # in CIELAB; 2.3 is just noticed
PAGES = "#ffffff", "#12171d"


def linear(color):
    encoded = np.array(matplotlib.colors.to_rgb(color))
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x = TO_XYZ @ rgb / WHITE
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one, other):
    """How far apart two colors are for whom they are least so."""
    simulated = (lambda rgb: rgb), (lambda rgb: np.clip(DEUTERANOPIA @ rgb, 0, 1))
    return min(np.linalg.norm(lab(see(linear(one))) - lab(see(linear(other)))) for see in simulated)


def test_red_and_green_look_alike_and_blue_does_not():
    """The simulation itself: a brown and a dark green that people confuse."""
    assert (
        distance("#8a6d00", "#7a7a1a")
        < 6
        < np.linalg.norm(lab(linear("#8a6d00")) - lab(linear("#7a7a1a")))
    )
    assert distance("#0000ff", "#ffff00") > 100


@pytest.mark.parametrize(
    "shown",
    [
        colors.FAMILIES,
        (*colors.WANTED, colors.TIMEOUT, *colors.UNWANTED[0]),
        (colors.WANTED[0], colors.UNWANTED[0][0], colors.UNLABELED),
        (render.DIAMOND, render.GHOST, render.FLAG, render.AGENT),
    ],
    ids=["families", "endings", "gates", "world"],
)
def test_colors_are_told_apart(shown):
    for one, other in combinations(shown, 2):
        assert distance(one, other) > APART, (one, other)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_playground_s_pieces_and_cells_are_told_apart(scheme):
    """The pieces, and what cells are tinted with: the ghost's color, none, the diamond's."""
    text = (files("oversight_rl.playground") / "web" / "style.css").read_text()
    of = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", text.split("prefers-color")[scheme]))
    pieces, cells = ("diamond", "ghost", "flag", "agent"), ("tint-ghost", "paper", "tint-diamond")
    for one, other in [*combinations(pieces, 2), *combinations(cells, 2)]:
        assert distance(of[one], of[other]) > APART, (one, other)


def test_the_ends_of_the_matrix_differ():
    ends = [matplotlib.colormaps[colors.DIVERGING](end)[:3] for end in (0.0, 0.5, 1.0)]
    for one, other in combinations(ends, 2):
        assert distance(one, other) > 2 * APART


def test_every_method_has_a_look_of_its_own():
    assert METHODS.keys() <= colors.STYLES.keys(), "a row of reports/colors.py is missing"
    assert len(set(colors.STYLES.values())) == len(colors.STYLES)
    assert {style.color for style in colors.STYLES.values()} < set(colors.FAMILIES)


def test_a_look_depends_on_the_name_alone(monkeypatch):
    before = {name: colors.style_of(name) for name in (*METHODS, "uphill")}
    monkeypatch.setattr(colors, "STYLES", dict(reversed(colors.STYLES.items())))
    assert {name: colors.style_of(name) for name in before} == before
    assert colors.style_of("uphill").color == colors.OTHER


@pytest.mark.parametrize("page", PAGES)
def test_lines_stand_out_from_the_page(page):
    """3:1, as WCAG 2.1 asks of graphics; dark pages mix in 35% of white."""
    luminance = TO_XYZ[1] @ linear(page)
    for color in colors.FAMILIES:
        own = TO_XYZ[1] @ linear(color)
        if page != PAGES[0]:
            own = TO_XYZ[1] @ linear(np.array(matplotlib.colors.to_rgb(color)) * 0.65 + 0.35)
        low, high = sorted((luminance, own))
        assert (high + 0.05) / (low + 0.05) >= 3, color
