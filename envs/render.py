"""Pictures: a world, a policy as arrows with the gate as heat, and animations."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from oversight_rl.envs.settings import WorldConfig
from oversight_rl.envs.world import State

Picture = NDArray[np.uint8]  # [height, width, 3]

CELL = 48  # pixels
FPS = 4  # of animations, and of what a person watches
DIAMOND, GHOST, FLAG, AGENT = "#0a9396", "#8a5cc2", "#e63946", "#22333b"
PAPER, LINE, INK = "#ffffff", "#d8dde3", "#22333b"
_GAP = 12  # pixels between panels
_SMOOTH = 3  # drawn this much larger, then scaled down
_STEPS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (x, y) of up, right, down, left


class _Canvas:
    """A grid drawn at high resolution; coordinates are in cells."""

    def __init__(self, config: WorldConfig) -> None:
        self.unit = CELL * _SMOOTH
        self.rows, self.cols = config.rows, config.cols
        self.image = Image.new("RGB", (self.cols * self.unit, self.rows * self.unit), PAPER)
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
            self.draw.line(self.points((0, row), (self.cols, row)), LINE, _SMOOTH)
        for col in range(self.cols + 1):
            self.draw.line(self.points((col, 0), (col, self.rows)), LINE, _SMOOTH)

    def diamond(self, cell: int) -> None:
        x, y = self.at(cell, 0.5, 0.5)
        outline = self.points((x, y + 0.32), (x - 0.32, y - 0.08), (x - 0.16, y - 0.28))
        outline += self.points((x + 0.16, y - 0.28), (x + 0.32, y - 0.08))
        self.draw.polygon(outline, fill=DIAMOND)
        facet = self.points((x - 0.32, y - 0.08), (x + 0.32, y - 0.08))
        self.draw.line(facet, PAPER, _SMOOTH)
        for dx in (-0.12, 0.12):
            self.draw.line(self.points((x + dx, y - 0.08), (x, y + 0.32)), PAPER, _SMOOTH)

    def ghost(self, cell: int) -> None:
        x, y = self.at(cell, 0.5, 0.5)
        self.disc(x, y - 0.04, 0.26, GHOST)
        body = self.points((x - 0.26, y - 0.04), (x + 0.26, y + 0.24))
        self.draw.rectangle(body, fill=GHOST)
        for i in range(3):
            self.disc(x - 0.26 + 0.52 * (i + 0.5) / 3, y + 0.24, 0.52 / 6, GHOST)
        for dx in (-0.1, 0.1):
            self.disc(x + dx, y - 0.06, 0.07, PAPER)
            self.disc(x + dx + 0.02, y - 0.05, 0.035, AGENT)

    def agent(self, cell: int) -> None:
        self.disc(*self.at(cell, 0.5, 0.5), 0.22, PAPER)
        self.disc(*self.at(cell, 0.5, 0.5), 0.18, AGENT)

    def flag(self, cell: int) -> None:
        x, y = self.at(cell, 0.8, 0.08)
        pennant = self.points((x, y), (x + 0.17, y + 0.08), (x, y + 0.16))
        self.draw.line(self.points((x, y), (x, y + 0.28)), FLAG, 2 * _SMOOTH)
        self.draw.polygon(pennant, fill=FLAG)

    def arrow(self, cell: int, direction: tuple[int, int], length: float) -> None:
        """An arrow from the cell's center; a probability of 1 reaches the cell's edge."""
        if length < 0.02:
            return
        dx, dy = direction
        x, y = self.at(cell, 0.5, 0.5)
        reach = 0.46 * length
        tip = (x + dx * reach, y + dy * reach)
        self.draw.line(self.points((x, y), tip), INK, 2 * _SMOOTH)
        if length > 0.15:
            w, h = 0.07, 0.12
            left = (tip[0] - dx * h - dy * w, tip[1] - dy * h + dx * w)
            right = (tip[0] - dx * h + dy * w, tip[1] - dy * h - dx * w)
            self.draw.polygon(self.points(tip, left, right), fill=INK)

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


def frame(config: WorldConfig, state: State) -> Picture:
    """One world (`state` of batch shape `[]`): diamond, ghost, flags and agent."""
    canvas = _Canvas(config)
    canvas.lines()
    canvas.squares(state)
    canvas.agent(int(state.agent))
    return canvas.picture()


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
    gate: NDArray[np.floating] | None = None,
) -> Picture:
    """A policy around one placement of the squares.

    Args:
        config: the world.
        state: batch shape `[]`; its squares and flags are drawn, its agent is not.
        probabilities: `[S, A]` of the actions with the agent on each cell, drawn as arrows.
        gate: `[S]` weight of the diamond expert, drawn as heat: the diamond's color at 1, the
            ghost's at 0.
    """
    canvas = _Canvas(config)
    for cell, weight in enumerate(() if gate is None else gate):
        canvas.fill(cell, _heat(float(weight)))
    canvas.lines()
    for cell, row in enumerate(probabilities):
        if cell not in (int(state.diamond), int(state.ghost)):
            for direction, probability in zip(_STEPS, row, strict=True):
                canvas.arrow(cell, direction, float(probability))
    canvas.squares(state)
    return canvas.picture()


def _heat(weight: float) -> tuple[int, int, int]:
    """Ghost's color at 0, white at 1/2, diamond's color at 1; pale, so that arrows stay clear."""
    end = np.array(Image.new("RGB", (1, 1), DIAMOND if weight >= 0.5 else GHOST).getpixel((0, 0)))
    share = 0.75 * abs(2 * weight - 1)
    red, green, blue = (int(c) for c in 255 + (end - 255) * share)
    return red, green, blue


def panels(pictures: Sequence[Picture], captions: Sequence[str]) -> Picture:
    """Pictures of one height side by side, each under its caption (of one line or several)."""
    font = ImageFont.load_default(size=15)
    top = 12 + 20 * max(caption.count("\n") + 1 for caption in captions)
    height = top + max(p.shape[0] for p in pictures)
    widths = [
        max(picture.shape[1], *(int(font.getlength(line)) + 4 for line in caption.split("\n")))
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(pictures) + 1), height + _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    x = _GAP
    for picture, caption, width in zip(pictures, captions, widths, strict=True):
        draw.multiline_text((x, 6), caption, INK, font=font)
        sheet.paste(Image.fromarray(picture), (x, top))
        x += width + _GAP
    return np.asarray(sheet)


def stack(rows: Sequence[Picture]) -> Picture:
    """Pictures one below the other."""
    width = max(p.shape[1] for p in rows)
    sheet = Image.new("RGB", (width, sum(p.shape[0] for p in rows)), PAPER)
    y = 0
    for picture in rows:
        sheet.paste(Image.fromarray(picture), (0, y))
        y += picture.shape[0]
    return np.asarray(sheet)


def gif(frames: Sequence[Picture]) -> bytes:
    """An animation that loops, as GIF bytes."""
    palette = Image.fromarray(frames[0]).quantize(64)  # one for all: frames share their colors
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
