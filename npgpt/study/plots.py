"""Pictures as SVG, which any browser shows, light or dark as the system is: loss curves, and attention.

    curves_svg(panels(logs), labels(runs, logs))        the rows of some runs' logs
    attention_svg(attention_maps(model, tokens), words)

A picture is the bytes of its file.  Drawing curves needs the standard library only.
"""

import html
import itertools
import math

from npgpt.errors import one_line

MOST_POINTS = 2000  # of a line; of longer ones the lowest and the highest point of each stretch are drawn
SMOOTHING = 1 / 100  # of a run: how far the smoothed training loss looks to either side

# a run's colour on a light and on a dark ground; the ninth run begins again
COLORS = (
    ("#1f6fb4", "#6cb4ee"), ("#d1342f", "#ff7b72"), ("#2b8a3e", "#7ee787"), ("#8250b8", "#c4a5f5"),
    ("#c96a00", "#ffb06b"), ("#0b8a99", "#6fe0ec"), ("#805044", "#d0a090"), ("#c2458f", "#f5a9dc"),
)  # fmt: skip


def points_of(rows, name):
    """(iteration, number) of the rows of a log that have such a number; None for one that is not finite."""
    found = ((row["iter"], row[name]) for row in rows if type(row.get(name, "")) in (int, float, type(None)))
    points = [(x, None if y is None or not math.isfinite(y) else float(y)) for x, y in found]
    while points and points[-1][1] is None:  # the row after the last update has no training loss
        points.pop()
    return points


def smoothed(points):
    """The mean of each point and those on both sides of it, with weights that fall exponentially with the distance."""
    finite = [(x, y) for x, y in points if y is not None]
    decay = 1 - 1 / max(1.0, len(finite) * SMOOTHING)

    def sums(ys):
        total = weight = 0.0
        for y in ys:
            total, weight = decay * total + y, decay * weight + 1
            yield total, weight

    before = list(sums(y for _, y in finite))
    after = reversed(list(sums(y for _, y in reversed(finite))))
    return [
        (x, (total + rest - y) / (weight + rest_weight - 1))  # each point is in both of its sums
        for (x, y), (total, weight), (rest, rest_weight) in zip(finite, before, after, strict=True)
    ]


def panels(logs):
    """[(title, height, lines)] of the curves of some runs, given the rows of their logs.

    A line is (the run's number, its style, its points).  A point is (iteration, number); a None there parts the line.
    """
    loss, norm, rate = [], [], []
    for n, rows in enumerate(logs):
        train, val = points_of(rows, "train_loss"), points_of(rows, "val_loss")
        loss += [(n, "light", train), (n, "strong", smoothed(train)), (n, "dotted", val)]
        norm.append((n, "light", points_of(rows, "grad_norm")))
        rate.append((n, "strong", points_of(rows, "lr")))
    found = ("loss", 330, loss), ("gradient norm", 90, norm), ("learning rate", 90, rate)
    return [panel for panel in found if any(y is not None for *_, points in panel[-1] for _, y in points)]


def labels(runs, logs):
    """What the legend says of each run: its name, and its best validation loss if it has one."""
    for run, rows in zip(runs, logs, strict=True):
        best = min(((y, x) for x, y in points_of(rows, "val_loss") if y is not None), default=None)
        yield one_line(str(run)) + (f": best validation loss {best[0]:.4f} at iteration {best[1]:,}" if best else "")


def segments(points):
    """The stretches of a line between its gaps, each with not too many points."""
    groups = itertools.groupby(points, lambda point: point[1] is None)
    for group in [list(group) for is_gap, group in groups if not is_gap]:
        if len(group) > MOST_POINTS:
            step = 2 * math.ceil(len(group) / MOST_POINTS)
            parts = [group[start : start + step] for start in range(0, len(group), step)]
            ends = [(min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])) for part in parts]
            group = [point for pair in ends for point in sorted({*pair})]
        yield group


class Axis:
    """Places numbers on the pixels from `start` to `end`, of which a share `margin` stays free at each end."""

    def __init__(self, numbers, start, end, margin=0.0):
        low, high = min(numbers), max(numbers)
        room = (high - low) * margin
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-100):  # a flat line, or a single point
            room = abs(low) / 10 or 0.5
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, number):
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most):
        """(number, text) of round numbers on the axis, at most about as many."""
        step = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(step))
        step = next(power * n for n in (1, 2, 5, 10, 20) if power * n >= step)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))  # behind the point
        figures = math.ceil(math.log10(max(abs(self.low), abs(self.high)) / step)) + 1  # that tell ticks apart
        for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            number = n * step
            yield number, f"{number:,.{digits}f}" if digits < 7 and abs(number) < 1e7 else f"{number:.{figures}g}"


def svg(width, height, title, parts):
    """An SVG of some parts, as bytes."""
    rules = [[f".c{n} {{ color: {color} }} " for n, color in enumerate(colors)] for colors in zip(*COLORS, strict=True)]
    light, dark = map("".join, rules)
    style = (
        "svg { background: #ffffff; color: #24292f; font: 12px system-ui, sans-serif } text { fill: currentColor } "
        "polyline { fill: none; stroke: currentColor; stroke-linejoin: round } circle { fill: currentColor } "
        ".light { stroke-width: 1; opacity: 0.35 } .strong { stroke-width: 2 } "
        ".dotted { stroke-width: 1.5; stroke-dasharray: 5 3 } "
        ".grid { stroke: #8885; stroke-width: 1 } .head { font-weight: 600 } .small { font-size: 10px } "
        f".frame {{ fill: none; stroke: #8888 }} path {{ fill: currentColor }} {light}"
        f"@media (prefers-color-scheme: dark) {{ svg {{ background: #0d1117; color: #e6edf3 }} {dark}}}"
    )
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f"<title>{html.escape(title)}</title>", f"<style>{style}</style>"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', *head, *parts, "</svg>\n"]).encode("utf-8")


def text_at(x, y, text, options=""):
    return f'<text x="{x:.2f}" y="{y:.2f}"{options}>{html.escape(text)}</text>'


def line_svg(run, style, points, x_axis, y_axis):
    """A line as polylines, and as circles where it is dotted or a single point."""
    color = f"c{run % len(COLORS)}"
    for segment in segments(points):
        places = [f"{x_axis(x):.2f},{y_axis(y):.2f}" for x, y in segment]
        if len(places) > 1:
            yield f'<polyline class="{color} {style}" points="{" ".join(places)}"/>'
        if style == "dotted" or len(places) == 1:
            for x, y in (place.split(",") for place in places):
                yield f'<circle class="{color}" cx="{x}" cy="{y}" r="2.6"/>'


def curves_svg(found, legend):
    """The picture of some panels as bytes; legend: a line of text for each run."""
    width, left, right = 960, 70, 24
    parts = [text_at(left, 24, "light: training loss; strong: the same, smoothed; dashed with points: validation")]
    y = 24
    for n, words in enumerate(legend):
        y += 20
        parts.append(f'<circle class="c{n % len(COLORS)}" cx="{left + 5}" cy="{y - 4}" r="5"/>')
        parts.append(text_at(left + 18, y, words))
    x_axis = Axis([x for *_, lines in found for *_, points in lines for x, _ in points], left, width - right)
    for title, height, lines in found:
        top, y = y + 36, y + 36 + height
        y_axis = Axis([value for *_, points in lines for _, value in points if value is not None], y, top, 0.04)
        parts.append(text_at(left, top - 8, title, ' class="head"'))
        for number, words in y_axis.ticks(height / 40):
            at = y_axis(number)
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.2f}" y2="{at:.2f}"/>')
            parts.append(text_at(left - 8, at + 4, words, ' text-anchor="end" class="y"'))
        for run, style, points in sorted(lines, key=lambda line: ("light", "strong", "dotted").index(line[1])):
            parts += line_svg(run, style, points, x_axis, y_axis)
        parts.append(f'<rect class="frame" x="{left}" y="{top}" width="{width - right - left}" height="{height}"/>')
    for number, words in x_axis.ticks(8):
        if abs(number - round(number)) < 1e-9:  # there is no half an iteration
            at = x_axis(number)
            parts.append(f'<line class="frame" x1="{at:.2f}" x2="{at:.2f}" y1="{y}" y2="{y + 5}"/>')
            parts.append(text_at(at, y + 19, words, ' text-anchor="middle" class="x"'))
    parts.append(text_at((left + width - right) / 2, y + 38, "iteration", ' text-anchor="middle"'))
    return svg(width, y + 50, "Loss curves", parts)


# --------------------------------------------------------------------------------------------------------------------
# Attention


def attention_maps(model, tokens):
    """The attention weights (n_head, T, T) of each layer of a GPT that reads (T,) tokens; rows are queries."""
    import numpy as np

    from npgpt.engine import no_grad, watched
    from npgpt.ops.attention import attention_weights_ref

    maps = []

    def made(op, out, parents, backward):
        if op == "causal_attention":
            maps.append(attention_weights_ref(parents[0].data, model.config.n_head)[0])

    with no_grad(), watched(made):
        model.features(np.asarray(tokens)[None])
    return maps


def attention_svg(maps, words):
    """A map for each layer (downwards) and head (to the right); words: what the T tokens are, as text."""
    T = len(words)
    cell = max(3, min(14, 420 // T))
    words = [one_line(word).replace(" ", "␣") for word in words if cell >= 9]
    words = [word if len(word) <= 9 else word[:8] + "…" for word in words]
    room = 8 + 6 * max(map(len, words), default=0)
    size = T * cell
    parts = [
        text_at(12, 22, "Each row is a position, which looks at itself and at those before it."),
        text_at(12, 38, "A row's weights sum to 1; a square is as dark as the root of its weight."),
    ]
    for n, weights in enumerate(maps):
        for h, p in enumerate(weights):
            x, y = 12 + room + h * (size + room + 16), 66 + room + n * (size + room + 34)
            parts.append(text_at(x, y - room - 4 if words else y - 8, f"layer {n}, head {h}", ' class="head"'))
            for t, word in enumerate(words):
                middle = (t + 0.5) * cell + 3.5
                turned = f' class="small" transform="rotate(-90 {x + middle:.2f} {y - 4})"'
                parts.append(text_at(x - 4, y + middle, word, ' text-anchor="end" class="small"'))
                parts.append(text_at(x + middle, y - 4, word, turned))
            parts.append(f'<g class="c0" transform="translate({x} {y}) scale({cell})" shape-rendering="crispEdges">')
            squares = {}  # level of opacity, of 16 -> its squares
            for t, row in enumerate(p.tolist()):
                for s in range(t + 1):
                    squares.setdefault(round(16 * math.sqrt(row[s])), []).append(f"M{s} {t}h1v1h-1z")
            squares.pop(0, None)
            for level, those in sorted(squares.items()):
                parts.append(f'<path fill-opacity="{level / 16}" d="{"".join(those)}"/>')
            parts += ["</g>", f'<rect class="frame" x="{x}" y="{y}" width="{size}" height="{size}"/>']
    width, height = 12 + len(maps[0]) * (size + room + 16), 66 + len(maps) * (size + room + 34)
    return svg(max(width, 520), height, "Attention", parts)
