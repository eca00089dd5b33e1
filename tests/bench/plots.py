"""PNG pictures of the figures and curves. Needs matplotlib (``pip install 'llmstream[bench]'``)."""

from __future__ import annotations

from pathlib import Path

from tests.bench.processes import Unavailable
from tests.bench.report import Curve, Figure, Report

CPU = "µs CPU per "


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes what can be drawn and returns the files. Raises Unavailable without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise Unavailable("matplotlib is not installed (pip install -e '.[bench]')") from None
    mpl.use("Agg")
    drawn = [_draw_curves(case, curves, folder) for case, curves in _by_case(report.curves).items()]
    compared = {
        case: [figure for figure in figures if figure.unit in (f"{CPU}chunk", f"{CPU}request")]
        for case, figures in _figures_by_case(report.figures).items()
    }
    return drawn + [_draw_bars(case, figures, folder) for case, figures in compared.items() if len(figures) > 1]


def _by_case(curves: list[Curve]) -> dict[str, list[Curve]]:
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.case, []).append(curve)
    return found


def _figures_by_case(figures: list[Figure]) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.case, []).append(figure)
    return found


def _draw_curves(case: str, curves: list[Curve], folder: Path) -> Path:
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.6), squeeze=False)
    for curve, axis in zip(curves, axes[0], strict=True):
        axis.plot([x for x, _ in curve.points], [y for _, y in curve.points], marker="o")
        axis.set(xscale="log", xlabel=curve.x, ylabel=curve.unit, title=curve.title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    picture.tight_layout()
    path = folder / f"{case}.png"
    picture.savefig(path, dpi=120)
    plt.close(picture)
    return path


def _draw_bars(case: str, figures: list[Figure], folder: Path) -> Path:
    import matplotlib.pyplot as plt

    ordered = sorted(figures, key=lambda figure: -figure.median)
    medians = [figure.median for figure in ordered]
    below = [figure.median - min(figure.values) for figure in ordered]
    above = [max(figure.values) - figure.median for figure in ordered]
    picture, axis = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(ordered)))
    colours = ["tab:orange" if figure.system.startswith("llmstream") else "tab:blue" for figure in ordered]
    bars = axis.barh([figure.system for figure in ordered], medians, xerr=[below, above], color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=6)
    axis.set(xscale="log", xlabel=f"{ordered[0].unit} (log scale)", title=case)
    axis.margins(x=0.15)
    picture.tight_layout()
    path = folder / f"{case}.png"
    picture.savefig(path, dpi=120)
    plt.close(picture)
    return path
