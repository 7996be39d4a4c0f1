"""Charts as SVG, without a plotting library: lines or points over two axes, each linear or logarithmic.

    draw([Series("cudnn", [(1024, 300.0), (2048, 420.0)])], title="...", x="keys", y="TFLOP/s", log_x=True)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 36, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22", "#e377c2",
           "#393b79", "#637939")
TICKS = 6


@dataclass(frozen=True)
class Series:
    """Points of one name; `dashed` marks what is no contender, `joined` draws the line."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    joined: bool = True


def draw(series: Sequence[Series], *, title: str, x: str, y: str, log_x: bool = False, log_y: bool = False) -> str:
    """The chart as the text of an SVG file."""
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points]
    across = _Axis.over(xs, log_x, LEFT, WIDTH - RIGHT, from_zero=False)
    up = _Axis.over(ys, log_y, HEIGHT - BOTTOM, TOP, from_zero=True)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(LEFT, 22, title, size=14)]
    for tick in across.ticks():
        at = across.place(tick)
        parts += [_line(at, TOP, at, HEIGHT - BOTTOM), _text(at, HEIGHT - BOTTOM + 18, _number(tick), "middle")]
    for tick in up.ticks():
        height = up.place(tick)
        parts += [_line(LEFT, height, WIDTH - RIGHT, height), _text(LEFT - 6, height + 4, _number(tick), "end")]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x, "middle"), _text(6, TOP - 6, y)]
    for order, one in enumerate(series):
        colour = COLOURS[order % len(COLOURS)]
        points = [(across.place(a), up.place(b)) for a, b in sorted(one.points)]
        dash = ' stroke-dasharray="6 4"' if one.dashed else ""
        if one.joined:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not one.dashed:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        row = TOP + 12 + 18 * order
        parts += [f'<line x1="{WIDTH - RIGHT + 12}" y1="{row - 4}" x2="{WIDTH - RIGHT + 36}" y2="{row - 4}" '
                  f'stroke="{colour}" stroke-width="2"{dash}/>', _text(WIDTH - RIGHT + 42, row, one.name)]
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], log: bool, start: float, end: float, from_zero: bool) -> "_Axis":
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        if from_zero and not log:
            low, high = min(0.0, low), 1.05 * high
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        return cls(low, high, log, start, end)

    def place(self, value: float) -> float:
        low, high, at = ((math.log2(x) for x in (self.low, self.high, value)) if self.log
                         else (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / (2 * TICKS)))
            return [2.0 ** power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / TICKS
        size = 10.0 ** math.floor(math.log10(rough))
        wide = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        return [wide * i for i in range(math.ceil(self.low / wide), math.floor(self.high / wide + 1e-9) + 1)]


def _number(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K"
    return f"{value:.6g}"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
