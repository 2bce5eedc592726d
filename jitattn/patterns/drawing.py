"""Draws patterns and masks: PNG and SVG pictures, and text for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import escape

import torch

from jitattn.errors import InvalidInputError, JitAttnError
from jitattn.patterns.seen import seen
from jitattn.spec import install

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from jitattn.values.masks import Mask

INK, PAPER, LINE, WORDS = (31, 78, 121), (255, 255, 255), (205, 205, 205), (70, 70, 70)
_WIDTH: Final = 1000  # pixels that a picture has, more or less
_FONT: Final = 12  # pixels of a line
_SHADES: Final = " ░▒▓█"
_MOST_BARS: Final = 200_000  # of an SVG, which few programs show with more


@dataclass(frozen=True, slots=True)
class _Panel:
    """Place of one head, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Label:
    """Text at a place; `anchor` as in Pillow: l, m or r, then a (top) or m (middle)."""

    left: float
    top: float
    text: str
    anchor: str


@dataclass(frozen=True, slots=True)
class _Layout:
    """A picture: its size, the panels of the heads, and labels."""

    width: int
    height: int
    panels: list[_Panel]
    labels: list[_Label]


def draw(
    pattern: Tensor | Mask | BlockMask,
    path: str | Path,
    *,
    cell: int | None = None,
    sizes: tuple[int, int, int] | None = None,
    batch_idx: int = 0,
    labels: bool = True,
    columns: int | None = None,
) -> None:
    """Draw a pattern or a mask: queries downwards, keys to the right, heads in a grid.

    Parameters
    ----------
    pattern : Tensor, [rows, columns] or [heads, rows, columns], bool; Mask; or BlockMask
        Of a tensor and of a block mask (ours or torch's) every block is drawn, of any other mask
        every pair. A mask that is the same for all heads is drawn once.
    path : path
        Where to; the suffix decides: .png, .svg, or .txt for what `text` returns.
    cell : int, optional
        Width of a block in pixels; chosen so that the picture is some 1000 pixels wide.
    sizes : (H, Lq, Lkv), optional
        Heads, queries and keys of a mask.
    batch_idx : int
        The sequence that is drawn of a mask.
    labels : bool
        Write the heads, and the numbers of the first and the last query and key.
    columns : int, optional
        Heads beside one another; chosen so that the grid is about as high as wide.

    Raises
    ------
    InvalidInputError
        The pattern is invalid or has no blocks, a mask comes without sizes, or the suffix is
        another.
    JitAttnError
        Pillow is not installed, which PNG needs: the extra "draw".
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".png", ".svg", ".txt"):
        raise InvalidInputError(
            f"path {str(path)!r}: its suffix decides what is drawn, and must be .png, .svg or .txt"
        )
    heads = _checked(pattern, sizes, batch_idx)
    if kind == ".txt":
        path.write_text(_as_text(heads, 100), encoding="utf-8")
        return
    plan = _laid_out(heads, cell, labels, columns)
    if kind == ".svg":
        path.write_text(_as_svg(heads, plan), encoding="utf-8")
    else:
        _write_png(heads, plan, path)


def text(
    pattern: Tensor | Mask | BlockMask,
    *,
    sizes: tuple[int, int, int] | None = None,
    batch_idx: int = 0,
    width: int = 64,
) -> str:
    """Return a pattern or a mask as text: dark cells are seen, grey ones in part.

    Parameters
    ----------
    pattern, sizes, batch_idx
        As in `draw`.
    width : int
        Cells of a line, two characters each; more columns share a cell.

    Raises
    ------
    InvalidInputError
        As `draw`.
    """
    if type(width) is not int or width < 1:
        raise InvalidInputError(f"width={width!r}: it must be an int of at least 1")
    return _as_text(_checked(pattern, sizes, batch_idx), width)


def _checked(pattern: Any, sizes: tuple[int, int, int] | None, batch_idx: int) -> Tensor:  # noqa: ANN401
    heads = seen(pattern, sizes, batch_idx).cpu()
    if not heads.numel():
        count, rows, columns = heads.shape
        raise InvalidInputError(
            f"pattern has {count} x {rows} x {columns} blocks: there is nothing to draw"
        )
    return heads


def _as_text(heads: Tensor, width: int) -> str:
    _, rows, columns = heads.shape
    step = -(-columns // width)
    lines = []
    for number, head in enumerate(heads):
        padded = torch.zeros(
            -(-rows // step) * step,
            -(-columns // step) * step,
            device=heads.device,
            dtype=torch.float32,
        )
        padded[:rows, :columns] = head
        count = torch.zeros_like(padded)
        count[:rows, :columns] = 1
        boxes = (one.unflatten(0, (-1, step)).unflatten(2, (-1, step)) for one in (padded, count))
        filled, there = (one.sum(dim=(1, 3)) for one in boxes)
        # Rounded up, so that one pair of many is to be seen, and only whole cells are dark.
        shade = (filled / there * (len(_SHADES) - 2)).ceil().int() + (filled == there).int()
        shade[filled == 0] = 0
        lines.append(f"head {number}: {rows} queries down, {columns} keys across")
        lines += ["".join(_SHADES[int(one)] * 2 for one in row).rstrip() for row in shade]
    return "\n".join(lines) + "\n"


def _laid_out(
    heads: Tensor, cell: int | None, has_labels: bool, grid_columns: int | None
) -> _Layout:
    """Return where everything goes."""
    count, rows, columns = heads.shape
    across = math.ceil(math.sqrt(count * rows / columns)) if grid_columns is None else grid_columns
    if type(across) is not int or across < 1:
        raise InvalidInputError(f"columns={grid_columns!r}: it must be an int of at least 1")
    across = min(across, count)
    if cell is None:
        cell = max(1, _WIDTH // (columns * across))
    gap = max(4, min(cell, _FONT))
    width, height = columns * cell, rows * cell
    digits = 0.62 * _FONT * max(len(str(rows - 1)), 1)
    left_room = int(digits) + 4 if has_labels else 0
    top_room = (_FONT + 6 + _FONT * (count > 1)) if has_labels else 0  # keys, and the head
    step_x, step_y = left_room + width + gap, top_room + height + gap
    panels, labels = [], []
    for head in range(count):
        line, place = divmod(head, across)
        panel = _Panel(
            gap + place * step_x + left_room, gap + line * step_y + top_room, width, height
        )
        panels.append(panel)
        if not has_labels:
            continue
        middle = panel.left + width / 2
        if count > 1:
            labels.append(_Label(middle, panel.top - top_room, f"head {head}", "ma"))
        above = panel.top - _FONT - 3
        labels.append(_Label(panel.left, above, "0", "la"))
        labels.append(_Label(panel.left - 4, panel.top + _FONT / 2, "0", "rm"))
        if columns > 1 and width > 6 * _FONT:
            labels.append(_Label(panel.left + width, above, str(columns - 1), "ra"))
            labels.append(_Label(middle, above, "keys", "ma"))
        if rows > 1 and height > 2 * _FONT:
            bottom = panel.top + height - _FONT / 2
            labels.append(_Label(panel.left - 4, bottom, str(rows - 1), "rm"))
    lines = -(-count // across)
    return _Layout(gap + across * step_x, gap + lines * step_y, panels, labels)


def _write_png(heads: Tensor, plan: _Layout, path: Path) -> None:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise JitAttnError(
            f"drawing a PNG needs Pillow (.svg and .txt do not); install it with: "
            f"{install.command('draw')}"
        ) from error
    picture = Image.new("RGB", (plan.width, plan.height), PAPER)
    brush = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_FONT)
    for head, panel in zip(heads, plan.panels, strict=True):
        # One pixel per block, then enlarged: fast for millions of blocks.
        pixels = head.to(torch.uint8).mul(255).contiguous().numpy()
        mask = Image.fromarray(pixels).resize((panel.width, panel.height), Image.Resampling.NEAREST)
        picture.paste(INK, (panel.left, panel.top), mask)
        right, bottom = panel.left + panel.width, panel.top + panel.height
        brush.rectangle((panel.left - 1, panel.top - 1, right, bottom), outline=LINE)
    for one in plan.labels:
        brush.text((one.left, one.top), one.text, fill=WORDS, font=font, anchor=one.anchor)
    picture.save(path, format="PNG")


def _as_svg(heads: Tensor, plan: _Layout) -> str:
    """Return the picture as SVG, with a bar for each run of blocks in a row."""
    _, rows, columns = heads.shape
    edges = torch.nn.functional.pad(heads.int(), (1, 1)).diff(dim=2)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    if len(starts) > _MOST_BARS:
        raise InvalidInputError(
            f"the picture has {len(starts)} bars, more than an SVG of {_MOST_BARS}: draw a .png"
        )
    ink, line, words = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (INK, LINE, WORDS))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{plan.width}" height="{plan.height}" '
        f'font-family="sans-serif" font-size="{_FONT}">',
        f'<rect width="{plan.width}" height="{plan.height}" fill="#ffffff"/>',
    ]
    width, height = plan.panels[0].width / columns, plan.panels[0].height / rows
    for (head, row, first), (_, _, last) in zip(starts.tolist(), stops.tolist(), strict=True):
        panel = plan.panels[head]
        parts.append(
            f'<rect x="{panel.left + first * width:g}" y="{panel.top + row * height:g}" '
            f'width="{(last - first) * width:g}" height="{height:g}" fill="{ink}"/>'
        )
    parts += [
        f'<rect x="{one.left - 0.5}" y="{one.top - 0.5}" width="{one.width + 1}" '
        f'height="{one.height + 1}" fill="none" stroke="{line}"/>'
        for one in plan.panels
    ]
    ends = {"l": "start", "m": "middle", "r": "end"}
    for label in plan.labels:
        baseline = label.top + (0.8 if label.anchor[1] == "a" else 0.35) * _FONT
        parts.append(
            f'<text x="{label.left:g}" y="{baseline:g}" fill="{words}" '
            f'text-anchor="{ends[label.anchor[0]]}">{escape(label.text)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
