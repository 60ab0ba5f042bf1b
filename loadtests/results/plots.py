"""Plots that are understood at a glance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GREY = "0.55"
COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8d6a9f", "#b08900", "#6c757d", "#222222")
"""Ours is the first."""


def plot_bench(report: dict[str, Any], stem: Path) -> list[Path]:
    """All plots that a report of one server has data for, as SVG files that begin with `stem`."""
    drawn = []
    if report.get("sweep"):
        drawn.append(_save(_draw_sweep, report, stem.with_name(f"{stem.name}-sweep.svg")))
    if report.get("overload"):
        drawn.append(_save(_draw_overload, report, stem.with_name(f"{stem.name}-overload.svg")))
    return drawn


def _save(draw: Callable[[Any, dict[str, Any]], None], report: dict[str, Any], file: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    # The same numbers give the same file.
    mpl.rcParams["svg.hashsalt"] = "stepserve"
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 4), layout="constrained")
    draw(figure, report)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file


def _draw_sweep(figure: Any, report: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    runs = report["sweep"]
    offered = [run["offered_rate_per_s"] for run in runs]
    for (name, colour), target in zip(_names(report), report["targets"], strict=False):
        shares = [100 * run["in_time"][target["name"]] for run in runs]
        left.plot(offered, shares, marker="o", color=colour, label=name)
    left.set(xlabel="offered requests per second", ylabel="in time, %", ylim=(0, 102))
    left.legend(title="latency target")
    for share, colour in (("p50", COLOURS[0]), ("p95", COLOURS[2]), ("p99", COLOURS[1])):
        values = [run["latency_s"][share] for run in runs]
        right.plot(offered, values, marker="o", color=colour, label=share)
    right.set(xlabel="offered requests per second", ylabel="latency of answers, s", yscale="log")
    right.legend()
    for axes in (left, right):
        _mark_capacity(axes, report)


def _names(report: dict[str, Any]) -> list[tuple[str, str]]:
    names = [target["name"].split(",")[0] for target in report["targets"]]
    return list(zip(names, COLOURS, strict=False))


def _mark_capacity(axes: Any, report: dict[str, Any]) -> None:
    if offline := report.get("offline"):
        axes.axvline(offline["throughput_per_s"], color=GREY, linestyle="--", linewidth=1)


def _draw_overload(figure: Any, report: dict[str, Any]) -> None:
    axes = figure.subplots()
    overload = report["overload"]
    axes.axvspan(overload["begins_s"], overload["ends_s"], color="0.92")
    points = overload["latency_by_second"]
    axes.plot(*zip(*points, strict=True), color=COLOURS[0])
    axes.set(
        xlabel="seconds (grey: twice the knee)",
        ylabel="median latency of arrivals, s",
        ylim=(0, None),
        title=f"{overload['refused']} refused, goodput {overload['goodput_over_knee']:.2f} of knee",
    )


def plot_bars(values: Sequence[tuple[str, float]], axis: str, file: Path) -> Path:
    """One bar for each server; ours is coloured."""

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        names, numbers = zip(*values, strict=True)
        bars = axes.barh(names, numbers, color=[COLOURS[0], *["0.7"] * (len(names) - 1)])
        axes.bar_label(bars, fmt=" %.2f")
        axes.invert_yaxis()
        axes.set_xlabel(axis)
        axes.spines[["top", "right"]].set_visible(False)

    return _save(draw, {}, file)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], axes_names: tuple[str, str], file: Path
) -> Path:
    """One line for each server over the offered rate; ours is the thick one."""

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        for index, (name, points) in enumerate(lines.items()):
            colour, width = COLOURS[index % len(COLOURS)], 2.5 if index == 0 else 1.2
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker="o", markersize=3, color=colour, linewidth=width, label=name)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1], ylim=(0, None))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.spines[["top", "right"]].set_visible(False)

    return _save(draw, {}, file)
