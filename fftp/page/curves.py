"""Line charts as inline SVG: colours come from the page's style, so that they follow light and dark."""

import math
from dataclasses import dataclass

from fftp.page.markup import text

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 44  # margins


@dataclass(frozen=True)
class Line:
    """A curve: its name, its colour (a class of the style: "one", "two" or "three"), and its (x, y)."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    faint: bool = False  # drawn behind, without marks

    def __post_init__(self):
        object.__setattr__(self, "points", [(x, y) for x, y in self.points if math.isfinite(y)])


def chart(title: str, unit: str, lines: list[Line], digits: int) -> str:
    """The lines over epochs, with a legend; unit: after each number, digits: behind its point."""
    lines = [line for line in lines if line.points]
    values = [y for line in lines for _, y in line.points] or [0.0, 1.0]
    last = max((x for line in lines for x, _ in line.points), default=1)
    first = 0 if any(x < 1 for line in lines for x, _ in line.points) else 1
    across = ticks(first, last, 8, whole=True)
    up = ticks(min(values), max(values), 5)
    low, high = min(up[0], *values), max(up[-1], *values)

    def place(x, y):
        wide = (x - first) / (last - first) if last > first else 0.5
        tall = (y - low) / (high - low) if high > low else 0.5
        return LEFT + wide * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - tall * (HEIGHT - TOP - BOTTOM)

    drawn = [_grid(place, across, up, digits)]
    drawn += [_curve(line, place, unit, digits) for line in sorted(lines, key=lambda line: not line.faint)]
    legend = "".join(f'<span class="key {line.colour}">{text(line.name)}</span>' for line in lines if not line.faint)
    return (
        f'<figure class="chart">\n<figcaption>{text(title)} <span class="keys">{legend}</span></figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(_said(title, lines, unit, digits))}">\n'
        + "\n".join(drawn)
        + "\n</svg>\n</figure>"
    )


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers from below low to above high (whole: whole numbers from low to high)."""
    span = max(high - low, 1e-9 * max(1.0, abs(low)))
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (step * factor) <= most - 1)
    if whole:
        step = max(1, math.ceil(step))
        return [x for x in range(math.ceil(low / step) * step, math.floor(high) + 1, step) if x >= low]
    first = math.floor(low / step)
    return [round(step * k, 12) for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def _grid(place, across, up, digits):
    marks = []
    for y in up:
        _, at = place(across[0] if across else 0, y)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        marks.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{y:.{_places(up, digits)}f}</text>')
    for x in across:
        at, _ = place(x, up[0])
        marks.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x:g}</text>')
    marks.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">epoch</text>')
    return "\n".join(marks)


def _places(numbers, most):
    """Digits behind the point that tell the ticks apart."""
    return next((d for d in range(most) if all(abs(round(y, d) - y) < 1e-9 for y in numbers)), most)


def _curve(line, place, unit, digits):
    at = [place(x, y) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    drawn = [f'<path class="line {line.colour}{" faint" if line.faint else ""}" d="{path}"/>']
    if not line.faint:
        for (x, y), (epoch, value) in zip(at, line.points, strict=True):
            said = text(f"{line.name}, epoch {epoch:g}: {value:.{digits}f}{unit}")
            drawn.append(
                f'<g class="mark {line.colour}"><title>{said}</title>'
                f'<circle class="near" cx="{x:.1f}" cy="{y:.1f}" r="10"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
            )
    return "\n".join(drawn)


def _said(title, lines, unit, digits):
    """The chart in words, for whoever does not see it."""
    parts = []
    for line in lines:
        if not line.faint:
            (_, first), (epoch, last) = line.points[0], line.points[-1]
            parts.append(f"{line.name} from {first:.{digits}f}{unit} to {last:.{digits}f}{unit} at epoch {epoch:g}")
    return f"{title}: {'; '.join(parts) or 'nothing yet'}"
