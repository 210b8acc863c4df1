"""The figures of the report, drawn with matplotlib and returned as SVG data URIs that an `<img>` can hold.

Each is drawn at the size it is shown at, so that its text stays readable; a phone gets another drawing of the bars.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

SERIES = {  # key: (name, colour of Okabe and Ito's palette, hatch: the series differ in print and for every eye)
    "before": ("before distillation", "#56B4E9", ""),
    "after": ("after distillation", "#0072B2", ""),
    "blind": ("after, picture taken away", "#E69F00", "////"),
    "majority": ("most frequent answer", "#C8C8C8", "---"),
}
SMOOTHING = 3
_INK, _GRID = "#222222", "#dddddd"
_STYLE = {
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.color": "#00000066",
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "vlkd",  # the same figures give the same bytes
}

Bar = tuple[float, Sequence[float] | None]
"""A fraction and its interval, where it has one."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel; `noisy` ones are drawn as points with a running mean over `SMOOTHING` of them."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str
    noisy: bool = False
    marker: str = "o"


def smooth(values: Sequence[float], window: int = SMOOTHING) -> np.ndarray:
    """Centred running mean; near the ends over the values there are. Returns float [len(values)]."""
    values, half = np.asarray(values, float), window // 2
    return np.array([values[max(k - half, 0) : k + half + 1].mean() for k in range(len(values))])


def bars(groups: dict[str, dict[str, Bar]], upright: bool) -> str:
    """Grouped bars in per cent with interval whiskers: upright for a wide page, lying for a narrow one.

    Args:
      groups: label of a group -> key of `SERIES` -> bar.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((10.4, 3.9) if upright else (3.75, 0.82 * len(groups) + 1.3))
        for place, (key, (name, color, hatch)) in enumerate(SERIES.items()):
            at = np.arange(len(groups)) + (place - (len(SERIES) - 1) / 2) * 0.2
            _draw_bars(axes, at, [group[key] for group in groups.values()], upright, key == "after", name, color, hatch)
        axes.set_ylim(0, 112) if upright else axes.set_xlim(0, 118)
        axes.grid(axis="y" if upright else "x", color=_GRID, linewidth=0.8)
        ticks, labels = (axes.set_xticks, axes.set_yticks) if upright else (axes.set_yticks, axes.set_xticks)
        ticks(range(len(groups)), list(groups))
        labels(range(0, 101, 20 if upright else 25))
        (axes.set_ylabel if upright else axes.set_xlabel)("answers right (%)")
        axes.margins(x=0.01) if upright else axes.margins(y=0.01)
        if not upright:
            axes.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=4 if upright else 1, frameon=False)
        return _data_uri(figure)


def bars_by_name(values: dict[str, Bar], label: str) -> str:
    """One lying bar a name, in per cent where `label` says so, with interval whiskers and its figure."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((7.4, 0.32 * len(values) + 0.9))
        scale = 100 if "%" in label else 1
        heights = np.array([scale * value for value, _ in values.values()])
        ends = np.array([scale * (bounds or (value, value))[1] for value, bounds in values.values()])
        starts = np.array([scale * (bounds or (value, value))[0] for value, bounds in values.values()])
        whiskers = np.clip(np.stack([heights - starts, ends - heights]), 0, None)
        style = {"color": SERIES["after"][1], "error_kw": {"ecolor": _INK, "elinewidth": 1, "capsize": 2}}
        axes.barh(range(len(values)), heights, 0.65, xerr=whiskers, **style)
        top = max(ends.max(), 1e-9)
        for place, (height, end) in enumerate(zip(heights, ends, strict=True)):
            axes.text(end + 0.015 * top, place, f"{height:.{1 if scale == 100 else 3}f}", va="center", fontsize=9)
        axes.set_xlim(0, 1.12 * top)
        axes.set_yticks(range(len(values)), list(values))
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.set_xlabel(label)
        axes.invert_yaxis()
        axes.margins(y=0.02)
        return _data_uri(figure)


def _draw_bars(axes, at, values: list[Bar], upright: bool, labelled: bool, name: str, color: str, hatch: str) -> None:
    heights = np.array([100 * value for value, _ in values])
    bounds = 100 * np.array([interval or (value, value) for value, interval in values])
    whiskers = np.clip(np.stack([heights - bounds[:, 0], bounds[:, 1] - heights]), 0, None)
    whiskers[:, [interval is None for _, interval in values]] = np.nan
    style: dict[str, Any] = {"color": color, "hatch": hatch, "label": name, "edgecolor": "white", "linewidth": 0.6}
    style |= {"error_kw": {"ecolor": _INK, "elinewidth": 1, "capsize": 2}}
    if upright:
        axes.bar(at, heights, 0.2, yerr=whiskers, **style)
    else:
        axes.barh(at, heights, 0.2, xerr=whiskers, **style)
    for place, height, end in zip(at, heights, bounds[:, 1], strict=True):
        if labelled and upright:
            axes.text(place, end + 1.5, f"{height:.1f}", ha="center", va="bottom", fontsize=9, fontweight="bold")
        elif labelled:
            axes.text(end + 2, place, f"{height:.1f}", ha="left", va="center", fontsize=9, fontweight="bold")


def panel(title: str, unit: str, curves: Sequence[Curve], top: float | None = None) -> str:
    """Curves over training steps on linear axes that begin at zero; `top` fixes the upper end."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((3.75, 2.9))
        for curve in curves:
            values = curve.values
            if curve.noisy:
                axes.plot(curve.steps, values, ".", color=curve.color, alpha=0.35, markersize=4)
                axes.plot(curve.steps, smooth(values), color=curve.color, linewidth=1.8, label=curve.name)
            else:
                style = {"marker": curve.marker, "markersize": 4.5, "linewidth": 1.4, "clip_on": False}
                axes.plot(curve.steps, values, color=curve.color, label=curve.name, **style)
        axes.set_ylim(0, top)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.legend(frameon=False, loc="best")
        return _data_uri(figure)


def _figure(inches: tuple[float, float]):
    """A figure without pyplot's global state (and so without a display); one inch is shown as 96 CSS pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _data_uri(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
