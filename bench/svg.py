"""Pictures as SVG text: a few shapes, and a chart of bars. No library draws them, so that a new run changes few lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.samples import Spread, plain

FONT = "system-ui, sans-serif"
NAMES, BAR, GAP, RIGHT = 190, 15, 4, 110
COLOURS = {"poolgate": "#e76f51", "poolgate, billing off": "#f4a261"}
OTHERS = "#8d99ae"
TOO_LONG = 10.0
"""A bar this many times as long as ours would leave nothing to be seen of the others: it is cut, and says so."""


class Canvas:
    """Shapes in the order of drawing, on white."""

    def __init__(self, width: float, height: float) -> None:
        self._size = (width, height)
        self._shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, *, fill: str, hint: str = "") -> None:
        title = f"<title>{escape(hint)}</title>" if hint else ""
        at = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.3, width):.1f}" height="{height:.1f}"'
        self._shapes.append(f'<rect {at} fill="{fill}">{title}</rect>')

    def text(
        self, x: float, y: float, words: str, *, size: int = 12, weight: str = "normal", end: bool = False
    ) -> None:
        anchor = ' text-anchor="end"' if end else ""
        style = f'font-size="{size}" font-weight="{weight}"{anchor}'
        self._shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>')

    def line(self, x: float, y: float, x2: float, y2: float) -> None:
        self._shapes.append(f'<path d="M{x:.1f} {y:.1f}L{x2:.1f} {y2:.1f}" stroke="#222" fill="none"/>')

    def svg(self) -> str:
        width, height = self._size
        view = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {view} font-family="{FONT}">'
        white = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>'
        return "\n".join([head, white, *self._shapes, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that belong together: a case, and the spread of each arm."""

    name: str
    bars: Sequence[tuple[str, Spread]]


def bars(title: str, unit: str, groups: Sequence[Group], width: int = 760) -> str:
    """Horizontal bars, one an arm, with a line from the least to the most."""
    height = 40 + sum(24 + len(group.bars) * (BAR + GAP) + 8 for group in groups)
    canvas = Canvas(width, height)
    canvas.text(10, 22, f"{title} ({unit})" if unit else title, size=14, weight="bold")
    scale = (width - NAMES - RIGHT) / _longest(groups)
    y = 40.0
    for group in groups:
        canvas.text(10, y + 14, group.name, weight="bold")
        y += 24
        for arm, spread in group.bars:
            _bar(canvas, y, arm, spread, scale, width)
            y += BAR + GAP
        y += 8
    return canvas.svg()


def _bar(canvas: Canvas, y: float, arm: str, spread: Spread, scale: float, width: int) -> None:
    room = width - NAMES - RIGHT
    long = max(0.0, spread.median) * scale
    is_cut = long > room * 1.001
    hint = f"{arm}: {plain(spread.median)} ({plain(spread.least)} - {plain(spread.most)})"
    canvas.text(NAMES - 8, y + 12, arm, end=True)
    canvas.box(NAMES, y, min(long, room), BAR, fill=COLOURS.get(arm, OTHERS), hint=hint)
    end = min(long, room)
    if not is_cut:
        least, most = (min(room + 30, max(0.0, value) * scale) for value in (spread.least, spread.most))
        canvas.line(NAMES + least, y + BAR / 2, NAMES + most, y + BAR / 2)
        end = max(end, most)
    canvas.text(NAMES + end + 6, y + 12, plain(spread.median) + (" (cut)" if is_cut else ""))


def _longest(groups: Sequence[Group]) -> float:
    """The longest bar that is drawn whole."""
    ours = [spread.median for group in groups for arm, spread in group.bars if arm == "poolgate"]
    medians = [spread.median for group in groups for _, spread in group.bars]
    limit = TOO_LONG * max(ours) if ours and max(ours) > 0 else max(medians, default=1.0)
    return max([median for median in medians if 0 < median <= limit], default=1.0)
