"""The pictures in docs/, by hand.

load.svg has goodput and p99 as the offered load grows, through the edge. Two panels,
one above the other, share the horizontal axis, in multiples of the capacity on a
logarithmic scale. soak.svg has a panel for each thing that should not grow, over the
minutes of chaos/soak.py.

The colours can be read on white and on dark pages, so there is no background.
"""

import math

WIDTH, HEIGHT = 760, 520
LEFT, RIGHT = 70, 740               # the panels' edges
GOOD, ACCEPTED, REFUSED, GREY = "#2a9d5c", "#3b82d0", "#d9782d", "#808890"
X_TICKS = 0.1, 0.2, 0.5, 1, 2, 5, 12
Y_TICKS = 0.01, 0.03, 0.1, 0.3, 1, 3   # seconds


def load(points, capacity):
    """points: (load, accepted a second, p99 of those, p99 of refused ones or 0)."""
    first, last = X_TICKS[0], X_TICKS[-1]
    top = capacity * 1.25

    def x(load):
        return LEFT + (RIGHT - LEFT) * math.log(load / first) / math.log(last / first)

    def y_good(rate):
        return 240 - 190 * rate / top

    def y_seconds(seconds):
        seconds = max(Y_TICKS[0], seconds)
        return 470 - 160 * math.log(seconds / Y_TICKS[0]) / math.log(
            Y_TICKS[-1] / Y_TICKS[0])

    parts = [text(LEFT, 30, "Registrations accepted a second", weight="bold"),
             text(LEFT, 290, "p99 of the answers", weight="bold")]
    for tick in X_TICKS:
        at = x(tick)
        parts += [line(at, 50, at, 240), line(at, 310, at, 470),
                  text(at, 490, f"{tick:g}×", anchor="middle")]
    parts.append(text((LEFT + RIGHT) / 2, 512, "offered load through the edge, in "
                      f"multiples of the capacity of {capacity:.0f} registrations/s",
                      anchor="middle"))
    step = 10 ** math.floor(math.log10(top / 2))
    step *= 2 if top / step > 7 else 1
    for rate in range(0, int(top) + 1, max(1, int(step))):
        parts += [line(LEFT, y_good(rate), RIGHT, y_good(rate)),
                  text(LEFT - 8, y_good(rate) + 4, str(rate), anchor="end")]
    for seconds in Y_TICKS:
        label = f"{seconds:g} s" if seconds >= 1 else f"{1000 * seconds:g} ms"
        parts += [line(LEFT, y_seconds(seconds), RIGHT, y_seconds(seconds)),
                  text(LEFT - 8, y_seconds(seconds) + 4, label, anchor="end")]

    ideal = [(x(each), y_good(min(each, 1) * capacity)) for each in (
        first, *(2 ** (n / 8 - 3) for n in range(25)), last)]
    parts.append(curve(ideal, GREY, dashed=True))
    parts.append(curve([(x(p[0]), y_good(p[1])) for p in points], GOOD))
    parts.append(curve([(x(p[0]), y_seconds(p[2])) for p in points], ACCEPTED))
    refused = [(x(p[0]), y_seconds(p[3])) for p in points if p[3]]
    parts.append(curve(refused, REFUSED))
    parts += legend(270, 290, ACCEPTED, "accepted (202)")
    parts += legend(420, 290, REFUSED, "refused (503, Retry-After)")
    parts += legend(420, 30, GREY, "ideal: all, up to the capacity", dashed=True)
    return svg(parts, HEIGHT)


def soak(panels, minutes, marks):
    """panels: (title, [(name, [(minute, value)])]); marks: minutes of the faults."""
    def x(minute):
        return LEFT + (RIGHT - LEFT) * minute / minutes

    parts, bottom = [], 0
    for title, series in panels:
        top, bottom = bottom + 50, bottom + 130
        step = tick_step(max(value for _, values in series for _, value in values))
        ticks = 4 * step        # the upper edge

        def y(value, bottom=bottom, ticks=ticks):
            return bottom - 80 * min(1, value / ticks)

        parts += [text(LEFT, top - 15, title, weight="bold"),
                  *(line(x(mark), top, x(mark), bottom, 0.6) for mark in marks)]
        for tick in (0, 2 * step, 4 * step):
            parts += [line(LEFT, y(tick), RIGHT, y(tick)),
                      text(LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")]
        for number, (name, values) in enumerate(series):
            colour = (GOOD, ACCEPTED, REFUSED, GREY)[number]
            parts.append(curve([(x(minute), y(value)) for minute, value in values],
                               colour, dots=False))
            if name:
                parts += legend(210 + 135 * number, top - 15, colour, name, dots=False)
    bottom += 25
    parts += [text(x(minutes * n / 6), bottom, f"{minutes * n / 6:g}", anchor="middle")
              for n in range(7)]
    parts.append(text((LEFT + RIGHT) / 2, bottom + 22, "minutes; each upright line is "
                      "a fault", anchor="middle"))
    return svg(parts, bottom + 35)


def tick_step(highest):
    """A round number, four of which are at least as much."""
    power = 10 ** math.floor(math.log10(max(highest, 1e-9) / 4))
    return power * next(n for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10)
                        if 4 * n * power >= highest)


def svg(parts, height):
    return "\n".join([
        (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
         f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'),
        *parts, "</svg>", ""])


def text(x, y, content, anchor="start", weight="normal"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{GREY}" '
            f'font-weight="{weight}">{content}</text>')


def line(x1, y1, x2, y2, opacity=0.3):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{GREY}" stroke-opacity="{opacity}"/>')


def curve(points, colour, dashed=False, dots=True):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    circles = "" if dashed or not dots else "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{1.5 if dashed else 2.5}"{dash}/>{circles}')


def legend(x, y, colour, content, dashed=False, dots=True):
    return [curve([(x, y - 4), (x + 26, y - 4)], colour, dashed, dots),
            text(x + 34, y, content)]
