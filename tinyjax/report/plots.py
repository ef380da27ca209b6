"""A plot as PNG bytes: the same bytes for the same data, and something to look at for any data."""

import io
import itertools
import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from tinyjax.report.display import printable, read
from tinyjax.report.document import Plot, Series
from tinyjax.report.thinning import thin

_FONT = "DejaVu Sans"  # ships with matplotlib, so the picture does not depend on the machine
_WIDTH, _HEIGHT, _LEGEND_ROW = 6.6, 3.8, 0.2  # inches
_DPI = 200
_COLUMNS = 2_000  # more than the pixels across the axes
_LEGEND_ENTRIES = 40
_LARGEST = 1e150  # matplotlib squares and subtracts coordinates: beyond this it overflows, so such values are gaps
# Okabe & Ito (2008), without the yellow that white swallows: told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v")
_INK, _GREY, _FAINT = "#374151", "#6b7280", "#e5e7eb"


def render(plot: Plot) -> bytes:
    """Return the plot as PNG. NaN, infinity and, on log axes, values that are not positive leave gaps."""
    labels = [series.label for series in plot.series] + [f"{name} ({read([y])[0]})" for name, y in plot.references]
    labels = [_readable(label, 60) for label in labels[:_LEGEND_ENTRIES]]
    rows = math.ceil(len(labels) / min(4, max(1, 84 // (max(map(len, labels), default=0) + 8))))
    figure = Figure(figsize=(_WIDTH, _HEIGHT + _LEGEND_ROW * rows), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    clouds = [_points(series, plot) for series in plot.series]
    levels = _drawable(np.array([y for _, y in plot.references], np.float64), plot.log_y)
    _frame(axes, plot, clouds, levels)
    handles = [_draw(axes, s, points, i) for i, (s, points) in enumerate(zip(plot.series, clouds, strict=True))]
    handles += [_refer(axes, y, i) for i, y in enumerate(levels)]
    _dress(axes, plot)
    if any(labels):
        legend = figure.legend(
            handles[: len(labels)],
            labels,
            loc="outside lower center",
            ncols=math.ceil(len(labels) / rows),
            frameon=False,
            prop=FontProperties(family=_FONT, size=9),
            title=f"the first {len(labels)} of {len(handles)}" if len(handles) > len(labels) else None,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _frame(axes: Axes, plot: Plot, clouds: list[np.ndarray], levels: np.ndarray) -> None:
    """Set the scales and the limits, or say that there is nothing to draw.

    matplotlib's own limits warn, and differ between versions, when values coincide up to rounding.
    """
    axes.set(xscale="log" if plot.log_x else "linear", yscale="log" if plot.log_y else "linear")
    axes.autoscale(False)
    x = [x_N[~np.isnan(y_N)] for x_N, y_N, _ in clouds]
    y = [y_N + sign * np.nan_to_num(error_N) for _, y_N, error_N in clouds for sign in (-1, 0, 1)]
    x_limits = _limits(np.concatenate([[], *x]), plot.log_x)
    y_limits = _limits(np.concatenate([levels, *y]), plot.log_y)
    if x_limits:
        axes.set_xlim(x_limits)
    if y_limits:
        axes.set_ylim(y_limits)
    if not (x_limits or y_limits):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=_GREY, fontfamily=_FONT)


def _drawable(values: np.ndarray, is_log: bool) -> np.ndarray:
    """Return the values with NaN for each that has no place on the axis."""
    drawable = np.abs(values) < _LARGEST
    return np.where(drawable & (values > 1 / _LARGEST) if is_log else drawable, values, np.nan)


def _limits(values: np.ndarray, is_log: bool) -> tuple[float, float] | None:
    """Return the ends of an axis that shows all values with some room, or None without a value."""
    values = _drawable(values, is_log)
    places = values[~np.isnan(values)]
    if not places.size:
        return None
    places = np.log10(places) if is_log else places
    low, high = float(places.min()), float(places.max())
    size = max(abs(low), abs(high))
    room = 0.05 * (high - low)
    if high - low <= 1e-9 * size:
        room = 0.3 if is_log else 0.05 * size or 1.0
    return (10 ** (low - room), 10 ** (high + room)) if is_log else (low - room, high + room)


def _points(series: Series, plot: Plot) -> np.ndarray:
    """Return the points to draw as [3, N]: x, y (NaN in gaps) and error (NaN where unknown)."""
    x_N, y_N = np.array(series.x), np.array(series.y)
    error_N = np.full_like(y_N, np.nan) if series.error is None else np.array(series.error)
    points = np.stack([_drawable(x_N, plot.log_x), _drawable(y_N, plot.log_y), _drawable(error_N, False)])
    points = points[:, ~np.isnan(points[0])]
    if series.style == "points":
        points = points[:, np.argsort(points[0], kind="stable")]
    if points.shape[1] > 4 * _COLUMNS:
        position_N = np.log10(points[0]) if plot.log_x else points[0]
        half_N = np.nan_to_num(points[2], nan=0.0)
        points = points[:, thin(position_N, np.stack([points[1] - half_N, points[1] + half_N]), _COLUMNS)]
    return points


def _draw(axes: Axes, series: Series, points: np.ndarray, index: int) -> Line2D | ErrorbarContainer:
    """Draw one series and return its legend handle."""
    x_N, y_N, error_N = points
    colour = _COLOURS[index % len(_COLOURS)]
    dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    marker = _MARKERS[index % len(_MARKERS)]
    has_error = np.isfinite(error_N).any()
    if series.style == "points":
        look = {"color": colour, "linestyle": "none", "marker": marker, "markersize": 4.5}
        if has_error:
            return axes.errorbar(x_N, y_N, yerr=error_N, capsize=2.5, elinewidth=1, **look)
        return axes.plot(x_N, y_N, **look)[0]
    if has_error:
        axes.fill_between(x_N, y_N - error_N, y_N + error_N, color=colour, alpha=0.16, linewidth=0)
    # A line needs two neighbours: a point between gaps would vanish without its own marker.
    known_N = ~np.isnan(y_N)
    alone = np.flatnonzero(known_N & ~np.append(False, known_N)[:-1] & ~np.append(known_N, False)[1:])
    (line,) = axes.plot(x_N, y_N, color=colour, linestyle=dash, linewidth=1.6, solid_joinstyle="round")
    if series.style == "both":
        line.set(marker=marker, markersize=4.5)
    elif alone.size:
        line.set(marker=marker, markersize=4.5, markevery=alone)
    return line


def _refer(axes: Axes, y: float, index: int) -> Line2D:
    """Draw one horizontal reference and return its legend handle; one without a place (NaN) is only in the legend."""
    look = {"color": _GREY, "linestyle": _DASHES[1 + index % 3], "linewidth": 1.1}
    return Line2D([], [], **look) if math.isnan(y) else axes.axhline(y, zorder=1, **look)


def _dress(axes: Axes, plot: Plot) -> None:
    """Titles, ticks and frame."""
    plain = {"parse_math": False, "fontfamily": _FONT}
    axes.set_title(_wrapped(plot.title, 62), loc="left", size=11.5, weight="bold", pad=10, color="#111827", **plain)
    axes.set_xlabel(_wrapped(plot.x_label, 72), size=10, color=_INK, **plain)
    axes.set_ylabel(_wrapped(plot.y_label, 38), size=10, color=_INK, **plain)
    axes.tick_params(which="both", labelsize=9, labelfontfamily=_FONT, color=_GREY, labelcolor=_INK, length=3)
    for axis, is_log in ((axes.xaxis, plot.log_x), (axes.yaxis, plot.log_y)):
        if is_log:
            _label_log(axis)
        else:
            axis.set_major_formatter(ScalarFormatter(useOffset=False, useMathText=True))
            axis.get_offset_text().set(size=9, color=_INK, fontfamily=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _label_log(axis: Axis) -> None:
    """Label powers of ten, and between them where the axis spans so little that too few would be seen."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: read([float(value)])[0]))
    if high / low > 40:
        axis.set_minor_formatter(NullFormatter())
        return

    def between(value: float, _: int) -> str:
        digit = round(value / 10 ** math.floor(math.log10(value)), 6)
        return read([float(value)])[0] if high / low < 4 or digit in (2, 5) else ""

    axis.set_minor_formatter(FuncFormatter(between))
    axis.grid(which="minor", color=_FAINT, linewidth=0.4)


def _readable(text: str, limit: int) -> str:
    """Return one line of at most `limit` characters, each of which the font can draw."""
    line = " ".join(printable(text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    font = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(c if font.get_char_index(ord(c)) else "\ufffd" for c in line)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(itertools.islice(textwrap.wrap(_readable(text, 3 * width), width), 4))
