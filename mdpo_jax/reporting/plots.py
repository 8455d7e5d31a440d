"""Plots of a run, as SVG or PNG by the file's suffix.

Colours are Okabe and Ito's, told apart with every common kind of colour blindness; lines carry their
names at their ends instead of a legend.  Missing and non-finite values leave a gap, never an error.
Matplotlib is imported inside the functions, since doors must start quickly, and without pyplot: no
display, no global state.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdpo_jax.reporting.results import ResultLine, Row, gather, number, stage_name
from mdpo_jax.reporting.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The yellow of the eight is left out: it does not show on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#5f6368"
_STAGE_COLOURS = dict(zip(("mdpo", "dpo", "raft", "mkto"), COLOURS, strict=False)) | {"sft": _GREY}
_SUFFIXES = (".svg", ".png")
_SMOOTHED_FROM = 40  # points; fewer are shown as they are

_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", (("loss", ""),)),
    ("pairs ranked right", (("rewards/accuracies", ""),)),
    ("reward margin", (("rewards/margins", ""),)),
    ("log-prob of a trajectory", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    (
        "log-ratio of chosen, by part",
        tuple((f"log_ratio/chosen/{part}", part) for part in ("text", "code", "answer")),
    ),
)


def accuracy_plot(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Accuracy by iteration with its interval: a column a split, a row a decoding, a line a stage.

    Rows are those of results.json.  Every stage's line starts at the SFT point, which it came from.
    """
    lines = gather(rows)
    splits = list(dict.fromkeys(line.split for line in lines)) or [""]
    decodings = [d for d in ("greedy", "sampled") if any(getattr(line, d) for line in lines)]
    decodings = decodings or ["greedy"]
    figure, axes = _grid(len(decodings), len(splits), 3.9, 2.7, share_y="col")
    for i, decoding in enumerate(decodings):
        for j, split in enumerate(splits):
            ax = axes[i][j]
            title = f"{split}, {'T = 1' if decoding == 'sampled' else decoding}".strip(", ")
            _title(ax, title)
            _accuracy_panel(ax, [line for line in lines if line.split == split], decoding)
            if j == 0:
                ax.set_ylabel("accuracy, %")
            if i == len(decodings) - 1:
                ax.set_xlabel("iteration")
    _finish(figure, path)


def training_plot(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> None:
    """Loss, rewards, log-probs and log-ratios by step: a column an iteration, in the order given.

    A record of a curve holds `step` and any of the training step's metrics.  From 40 points on, a
    running mean is drawn over pale points.
    """
    named = list(curves.items()) or [("", [])]
    panels = [p for p in _PANELS if any(_has(records, p[1]) for _, records in named)]
    panels = panels or list(_PANELS[:1])
    figure, axes = _grid(len(panels), len(named), max(2.2, 8.0 / len(named)), 1.9, share_y="row")
    for j, (name, records) in enumerate(named):
        _title(axes[0][j], name)
        for i, (label, fields) in enumerate(panels):
            ax = axes[i][j]
            # Named once a row, at its right end: names between panels would push them apart.
            last = not any(_has(later, fields) for _, later in named[j + 1 :])
            _curves(ax, records, fields, last)
            if j == 0:
                ax.set_ylabel(label)
        axes[-1][j].set_xlabel("step")
    _finish(figure, path)


def pass_at_k_plot(
    series: Mapping[str, Mapping[int, float]],
    path: str | os.PathLike[str],
    bands: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> None:
    """Share of problems with a right answer among k samples, against k on a log axis.

    series: name of the policy -> k -> pass@k in [0, 1]; one whose name ends in maj@k is of votes and
    drawn dashed.  bands: (low, high) at the same k, where there are.
    """
    figure, axes = _grid(1, 1, 6.4, 3.8)
    ax = axes[0][0]
    ends: list[tuple[float, float, str, str]] = []
    ticks: set[int] = set()
    for i, (name, values) in enumerate(series.items()):
        points = [(int(k), v) for k in values if (v := number(values[k])) is not None and k > 0]
        if not points:
            continue
        x, y = np.array(sorted(points)).T
        colour, style = COLOURS[i % len(COLOURS)], "--o" if name.endswith("maj@k") else "-o"
        ax.plot(x, 100 * y, style, color=colour, markersize=4, linewidth=1.6)
        band = (bands or {}).get(name)
        if band:
            edges = 100 * np.array([band[int(k)] for k in x]).T
            ax.fill_between(x, *edges, color=colour, alpha=0.12, linewidth=0)
        ends.append((x[-1], 100 * y[-1], name, colour))
        ticks.update(int(k) for k in x)
    if not ends:
        _nothing(ax)
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        ax.minorticks_off()
    _name_ends(ax, ends)
    ax.set_xlabel("k, samples a problem")
    votes = any(name.endswith("maj@k") for name in series)
    ax.set_ylabel("problems, %" if votes else "pass@k, %")
    _finish(figure, path)


def _accuracy_panel(ax: Axes, lines: Sequence[ResultLine], decoding: str) -> None:
    start = [line for line in lines if line.stage == "sft" and getattr(line, decoding)]
    stages = list(dict.fromkeys(line.stage for line in lines if line.stage != "sft"))
    ends: list[tuple[float, float, str, str]] = []
    for i, stage in enumerate(stages or ["sft"]):
        own = [line for line in lines if line.stage == stage and getattr(line, decoding)]
        path = _points(start[-1:] + own if stages else own, decoding)
        if not len(path):
            continue
        colour = _STAGE_COLOURS.get(stage, COLOURS[-1 - i % len(COLOURS)])
        # Stages side by side, so that their intervals do not cover each other.
        x = path[:, 0] + np.where(path[:, 0] > 0, 0.05 * (i - (len(stages) - 1) / 2), 0.0)
        ax.plot(x, path[:, 1], "-", color=colour, linewidth=1.6)
        ax.errorbar(
            x, path[:, 1], yerr=path[:, 2:].T, fmt="o", color=colour, markersize=4.5, elinewidth=1.1
        )
        ends.append((x[-1], path[-1, 1], stage_name(stage), colour))
    if not ends:
        _nothing(ax)
        return
    if start and stages:
        _first_point(ax, _points(start[-1:], decoding))
    last = max(line.iteration for line in lines)
    ax.set_xticks(range(last + 1), ["SFT" if start and not i else str(i) for i in range(last + 1)])
    ax.set_xlim(-0.2, max(last, 0.5) + 0.15)
    _name_ends(ax, ends)


def _first_point(ax: Axes, point: np.ndarray) -> None:
    for x, y, below, above in point:
        ax.errorbar(
            [x], [y], yerr=[[below], [above]], fmt="o", color=_GREY, markersize=4.5, elinewidth=1.1
        )


def _points(lines: Iterable[ResultLine], decoding: str) -> np.ndarray:
    """[points, 4]: iteration, accuracy, and how far the interval reaches below and above, in %."""
    found = []
    for line in lines:
        row: Row = getattr(line, decoding)
        y = number(row.get("accuracy"))
        if y is None:
            continue
        bounds = [number(row.get(field)) for field in ("low", "high")]
        low, high = (y if bound is None else bound for bound in bounds)
        found.append((line.iteration, 100 * y, 100 * max(y - low, 0), 100 * max(high - y, 0)))
    return np.array(sorted(found), dtype=float).reshape(-1, 4)


def _has(records: Iterable[Mapping[str, Any]], fields: Iterable[tuple[str, str]]) -> bool:
    return any(number(record.get(field)) is not None for record in records for field, _ in fields)


def _curves(
    ax: Axes,
    records: Sequence[Mapping[str, Any]],
    fields: Sequence[tuple[str, str]],
    named: bool,
) -> None:
    ends: list[tuple[float, float, str, str]] = []
    for (field, name), colour in zip(fields, COLOURS, strict=False):
        points = [
            (x, y)
            for i, record in enumerate(records)
            if (y := number(record.get(field))) is not None
            and (x := number(record.get("step", i))) is not None
        ]
        if points:
            end = _curve(ax, np.array(points), colour)
            ends.append((*end, name, colour))
    if not ends:
        _nothing(ax)
    elif named:
        _name_ends(ax, ends)


def _curve(ax: Axes, points: np.ndarray, colour: str) -> tuple[float, float]:
    """Draw points [n, 2]; returns the last point of the line."""
    x, y = points.T
    if len(y) >= _SMOOTHED_FROM:
        ax.plot(x, y, ".", color=colour, alpha=0.45, markersize=2.5, markeredgewidth=0)
        y = _running_mean(y, len(y) // 20)
    marker = "-o" if len(y) < 12 else "-"
    ax.plot(x, y, marker, color=colour, linewidth=1.5, markersize=3)
    return float(x[-1]), float(y[-1])


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean of the values at most `half` places away; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _grid(
    rows: int, columns: int, width: float, height: float, share_y: str | bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns bare panels of width x height inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)  # type: ignore[union-attr]
    axes: Any = figure.subplots(rows, columns, squeeze=False, sharey=share_y)  # type: ignore[arg-type]
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_GREY)
        ax.tick_params(color=_GREY, labelcolor=_GREY, labelsize=9, length=3, labelleft=True)
        ax.xaxis.label.set(color=_GREY, fontsize=9)
        ax.yaxis.label.set(color=_GREY, fontsize=9)
        ax.yaxis.grid(True, color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.margins(x=0.03, y=0.08)
    return figure, axes.tolist()


def _title(ax: Axes, text: str) -> None:
    ax.set_title(one_line(text, 40), fontsize=10, loc="left", fontweight="bold", parse_math=False)


def _nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=_GREY)
    # Hidden, not removed: other panels share the axis.
    ax.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.yaxis.grid(False)


def _name_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of its last point (x, y, name, colour), spread to not overlap."""
    if not ends:
        return
    pixels = ax.transData
    ax.autoscale_view()
    room = 11.0 * ax.figure.dpi / 72.0  # one line of 9-point text
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    wanted = np.array([pixels.transform(ends[i][:2])[1] for i in order])
    placed = _spread(wanted, room)
    for at, i in enumerate(order):
        x, y, name, colour = ends[i]
        shift = (placed[at] - wanted[at]) * 72.0 / ax.figure.dpi
        ax.annotate(
            one_line(name, 40),
            (x, y),
            xytext=(7, shift),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            parse_math=False,
        )


def _spread(wanted: np.ndarray, room: float) -> np.ndarray:
    """Positions at least `room` apart and near the ascending `wanted`, kept around their middle."""
    placed = wanted.copy()
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + room)
    return placed - (placed - wanted).mean()


def _finish(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure whole or not at all; the same figure gives the same bytes."""
    import matplotlib

    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"plot: {path.name!r}; expected a name that ends in .svg or .png")
    partial = path.with_name(path.name + ".partial")
    kind = path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "mdpo_jax"}):
        figure.savefig(partial, format=kind, dpi=150, metadata=metadata)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
