"""Pictures: a world, a policy as arrows with the gate as heat, and animations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import State

Picture = NDArray[np.uint8]  # [height, width, 3]

CELL = 48  # pixels
FPS = 4  # of animations, and of what a person watches
DIAMOND, GHOST, FLAG, AGENT = "#0a9396", "#8a5cc2", "#f0a202", "#d62839"
_GAP = 12  # pixels between panels
_SMOOTH = 3  # drawn this much larger, then scaled down
_TEXT = 15  # pixels, of captions


@dataclass(frozen=True)
class Theme:
    """What lies below a picture."""

    paper: str
    line: str
    ink: str
    onto_ghost: str
    """Of arrows that lead to the ghost."""


LIGHT = Theme("#ffffff", "#d8dde3", "#22333b", "#5b1fa8")
DARK = Theme("#12171d", "#3a4653", "#e6edf3", "#d3b4ff")
_STEPS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (x, y) of up, right, down, left


class _Canvas:
    """A grid drawn at high resolution; coordinates are in cells."""

    def __init__(self, config: WorldConfig, theme: Theme = LIGHT, scale: int = 1) -> None:
        self.unit = CELL * _SMOOTH * scale
        self.thin = _SMOOTH * scale  # a line
        self.rows, self.cols, self.theme = config.rows, config.cols, theme
        self.image = Image.new("RGB", (self.cols * self.unit, self.rows * self.unit), theme.paper)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, cell: int, x: float, y: float) -> tuple[float, float]:
        row, col = divmod(cell, self.cols)
        return col + x, row + y

    def points(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * self.unit, y * self.unit) for x, y in points]

    def disc(self, x: float, y: float, radius: float, color: str) -> None:
        corners = self.points((x - radius, y - radius), (x + radius, y + radius))
        self.draw.ellipse(corners, fill=color)

    def fill(self, cell: int, color: tuple[int, int, int]) -> None:
        self.draw.rectangle(self.points(self.at(cell, 0, 0), self.at(cell, 1, 1)), fill=color)

    def lines(self) -> None:
        for row in range(self.rows + 1):
            self.draw.line(self.points((0, row), (self.cols, row)), self.theme.line, self.thin)
        for col in range(self.cols + 1):
            self.draw.line(self.points((col, 0), (col, self.rows)), self.theme.line, self.thin)

    def diamond(self, cell: int) -> None:
        x, y = self.at(cell, 0.5, 0.5)
        outline = self.points((x, y + 0.32), (x - 0.32, y - 0.08), (x - 0.16, y - 0.28))
        outline += self.points((x + 0.16, y - 0.28), (x + 0.32, y - 0.08))
        self.draw.polygon(outline, fill=DIAMOND)
        facet = self.points((x - 0.32, y - 0.08), (x + 0.32, y - 0.08))
        self.draw.line(facet, LIGHT.paper, self.thin)
        for dx in (-0.12, 0.12):
            self.draw.line(self.points((x + dx, y - 0.08), (x, y + 0.32)), LIGHT.paper, self.thin)

    def ghost(self, cell: int) -> None:
        x, y = self.at(cell, 0.5, 0.5)
        self.disc(x, y - 0.04, 0.26, GHOST)
        body = self.points((x - 0.26, y - 0.04), (x + 0.26, y + 0.24))
        self.draw.rectangle(body, fill=GHOST)
        for i in range(3):
            self.disc(x - 0.26 + 0.52 * (i + 0.5) / 3, y + 0.24, 0.52 / 6, GHOST)
        for dx in (-0.1, 0.1):
            self.disc(x + dx, y - 0.06, 0.07, LIGHT.paper)
            self.disc(x + dx + 0.02, y - 0.05, 0.035, LIGHT.ink)

    def agent(self, cell: int) -> None:
        self.disc(*self.at(cell, 0.5, 0.5), 0.22, LIGHT.paper)
        self.disc(*self.at(cell, 0.5, 0.5), 0.18, AGENT)

    def ring(self, cell: int, color: str) -> None:
        x, y = self.at(cell, 0.5, 0.5)
        corners = self.points((x - 0.47, y - 0.47), (x + 0.47, y + 0.47))
        self.draw.ellipse(corners, outline=color, width=4 * self.thin)

    def flag(self, cell: int) -> None:
        x, y = self.at(cell, 0.8, 0.08)
        pennant = self.points((x, y), (x + 0.17, y + 0.08), (x, y + 0.16))
        self.draw.line(self.points((x, y), (x, y + 0.28)), self.theme.ink, 2 * self.thin)
        self.draw.polygon(pennant, fill=FLAG)

    def arrow(self, cell: int, direction: tuple[int, int], length: float, color: str) -> None:
        """An arrow from the cell's center; a probability of 1 reaches the cell's edge."""
        if length < 0.02:
            return
        dx, dy = direction
        x, y = self.at(cell, 0.5, 0.5)
        reach = 0.46 * length
        tip = (x + dx * reach, y + dy * reach)
        self.draw.line(self.points((x, y), tip), color, 2 * self.thin)
        if length > 0.15:
            w, h = 0.07, 0.12
            left = (tip[0] - dx * h - dy * w, tip[1] - dy * h + dx * w)
            right = (tip[0] - dx * h + dy * w, tip[1] - dy * h - dx * w)
            self.draw.polygon(self.points(tip, left, right), fill=color)

    def squares(self, state: State) -> None:
        self.diamond(int(state.diamond))
        self.ghost(int(state.ghost))
        for cell in _flagged(state):
            self.flag(cell)

    def picture(self) -> Picture:
        return np.asarray(self.image.reduce(_SMOOTH))


def _flagged(state: State) -> set[int]:
    """Cells that show a flag."""
    own = ((state.diamond_flag, state.diamond), (state.ghost_flag, state.ghost))
    return {*state.spurious.nonzero()[:, 0].tolist(), *(int(cell) for flag, cell in own if flag)}


def frame(config: WorldConfig, state: State, ring: str | None = None) -> Picture:
    """One world (`state` of batch shape `[]`): diamond, ghost, flags and agent.

    A `ring` of some color around the agent says that the episode has ended.
    """
    canvas = _Canvas(config)
    canvas.lines()
    canvas.squares(state)
    canvas.agent(int(state.agent))
    if ring is not None:
        canvas.ring(int(state.agent), ring)
    return canvas.picture()


def framed(picture: Picture, color: str) -> Picture:
    """A picture of an episode's end, in a frame of some color."""
    image = Image.fromarray(picture)
    edge = max(3, image.width // 40)
    corners = (0, 0, image.width - 1, image.height - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=color, width=edge)
    return np.asarray(image)


def text(config: WorldConfig, state: State) -> str:
    """One world as text: A agent, D diamond, G ghost; `!` follows a flagged cell."""
    grid = [[". " for _ in range(config.cols)] for _ in range(config.rows)]
    flagged = _flagged(state)
    letters = {int(state.diamond): "D", int(state.ghost): "G", int(state.agent): "A"}
    for cell in flagged | letters.keys():
        row, col = divmod(cell, config.cols)
        grid[row][col] = letters.get(cell, ".") + ("!" if cell in flagged else " ")
    return "\n".join("".join(line).rstrip() for line in grid)


def policy(
    config: WorldConfig,
    state: State,
    probabilities: NDArray[np.floating],
    tint: NDArray[np.floating] | None = None,
    theme: Theme = LIGHT,
    scale: int = 1,
) -> Picture:
    """A policy around one placement of the squares.

    Args:
        config: the world.
        state: batch shape `[]`; its squares and flags are drawn, its agent is not.
        probabilities: `[S, A]` of the actions with the agent on each cell, drawn as arrows; those
            onto the ghost have its color.
        tint: `[S]` of each cell: the diamond's color at 1, the ghost's at 0.
        theme: what lies below.
        scale: of the picture.
    """
    canvas = _Canvas(config, theme, scale)
    for cell, weight in enumerate(() if tint is None else tint):
        canvas.fill(cell, _heat(float(weight), theme))
    canvas.lines()
    diamond, ghost = int(state.diamond), int(state.ghost)
    for cell, row in enumerate(probabilities):
        if cell not in (diamond, ghost):
            for (dx, dy), probability in zip(_STEPS, row, strict=True):
                within = 0 <= cell % config.cols + dx < config.cols
                onto = within and cell + dx + dy * config.cols == ghost
                color = theme.onto_ghost if onto else theme.ink
                canvas.arrow(cell, (dx, dy), float(probability), color)
    canvas.squares(state)
    return canvas.picture()


def _heat(weight: float, theme: Theme = LIGHT) -> tuple[int, int, int]:
    """Ghost's color at 0, paper at 1/2, diamond's color at 1; pale, so that arrows stay clear."""
    end, paper = (
        np.array(Image.new("RGB", (1, 1), color).getpixel((0, 0)))
        for color in (DIAMOND if weight >= 0.5 else GHOST, theme.paper)
    )
    share = 0.75 * abs(2 * weight - 1)
    red, green, blue = (int(c) for c in paper + (end - paper) * share)
    return red, green, blue


def widths(
    pictures: Sequence[Picture], captions: Sequence[Sequence[str]], scale: int = 1
) -> list[int]:
    """Width of each panel: of its picture, or of the widest of its captions."""
    font = ImageFont.load_default(size=_TEXT * scale)
    lines = [[line for caption in own for line in caption.split("\n")] for own in captions]
    return [
        max(picture.shape[1], *(int(font.getlength(line)) + 4 * scale for line in own))
        for picture, own in zip(pictures, lines, strict=True)
    ]


def panels(
    pictures: Sequence[Picture],
    captions: Sequence[str],
    wide: Sequence[int] | None = None,
    theme: Theme = LIGHT,
    scale: int = 1,
) -> Picture:
    """Pictures of one height side by side, each under its caption (of one line or several).

    Args:
        pictures: of the panels.
        captions: the first line of each is the largest.
        wide: width of each panel, so that all frames of an animation have the same; by default as
            wide as need be.
        theme: what lies below.
        scale: of captions and gaps.
    """
    wide = widths(pictures, [[caption] for caption in captions], scale) if wide is None else wide
    font, gap = ImageFont.load_default(size=_TEXT * scale), _GAP * scale
    lines = max(caption.count("\n") + 1 for caption in captions)
    top = gap + (_TEXT + 5) * scale * lines
    height = top + max(p.shape[0] for p in pictures)
    size = sum(wide) + gap * (len(pictures) + 1), height + gap
    sheet = Image.new("RGB", size, theme.paper)
    draw = ImageDraw.Draw(sheet)
    x = gap
    for picture, caption, width in zip(pictures, captions, wide, strict=True):
        draw.multiline_text((x, gap // 2), caption, theme.ink, font=font, spacing=5 * scale)
        sheet.paste(Image.fromarray(picture), (x, top))
        x += width + gap
    return np.asarray(sheet)


def key(
    entries: Sequence[tuple[str, str, str]], width: int, theme: Theme = LIGHT, scale: int = 1
) -> Picture:
    """A legend of tints so wide: what each says, at the ghost's end and at the diamond's."""
    font, gap = ImageFont.load_default(size=_TEXT * scale), _GAP * scale
    row, bar = (_TEXT + 9) * scale, 4 * _TEXT * scale
    sheet = Image.new("RGB", (width, row * len(entries) + gap // 2), theme.paper)
    draw = ImageDraw.Draw(sheet)
    for i, (what, low, high) in enumerate(entries):
        x, y = float(gap), i * row
        draw.text((x, y), f"{what}: {low}", theme.ink, font=font)
        x += font.getlength(f"{what}: {low}") + gap / 2
        for j in range(bar):
            line = (x + j, y + 2 * scale, x + j, y + _TEXT * scale)
            draw.line(line, _heat(j / (bar - 1), theme))
        draw.text((x + bar + gap / 2, y), high, theme.ink, font=font)
    return np.asarray(sheet)


def stack(rows: Sequence[Picture], theme: Theme = LIGHT) -> Picture:
    """Pictures one below the other."""
    width = max(p.shape[1] for p in rows)
    sheet = Image.new("RGB", (width, sum(p.shape[0] for p in rows)), theme.paper)
    y = 0
    for picture in rows:
        sheet.paste(Image.fromarray(picture), (0, y))
        y += picture.shape[0]
    return np.asarray(sheet)


def gif(frames: Sequence[Picture]) -> bytes:
    """An animation that loops, as GIF bytes."""
    some = stack(frames[:: -(-len(frames) // 8)])
    palette = Image.fromarray(some).quantize(64)  # one for all: frames share their colors
    first, *others = (
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
    )
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 // FPS, loop=0)
    return buffer.getvalue()


def png(picture: Picture) -> bytes:
    """A picture as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
