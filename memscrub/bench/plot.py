"""The success-versus-locality plot of a bench: KL against the share of texts over the limit; knows its table only.

matplotlib is an optional extra; whoever asks for a plot without it is told so before any work is done.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from memscrub.bench.table import Bench, Row
from memscrub.errors import OutputError, UsageError

SUFFIXES = (".svg", ".png")
# On the logarithmic axis a KL of zero stands here.
LEAST_KL = 1e-6
_MARKERS = {"edit": ("o", "tab:blue", "edits"), "fine-tuning": ("^", "tab:orange", "fine-tuning, best of the grid")}


def check_plot(file: Path) -> None:
    """Raise UsageError when no plot can be drawn to this file."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{file}: a plot is written as {' or '.join(SUFFIXES)}; name the file so.")
    if find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib, which is not installed; pip install 'memscrub[plot]'.")


def draw(bench: Bench, file: Path) -> None:
    """Write the scatter plot: every method of the table, and in grey all other fine-tuning checkpoints."""
    check_plot(file)
    # Figures by hand, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    grey = [place for row in bench.runs if (place := _place(row)) is not None]
    if grey:
        x, y = zip(*grey, strict=True)
        axes.scatter(x, y, marker="^", c="lightgrey", s=16, label="fine-tuning, other settings")
    key: list[str] = []
    for kind, (marker, colour, label) in _MARKERS.items():
        rows = [(row, place) for row in bench.rows if row.kind == kind and (place := _place(row)) is not None]
        if not rows:
            continue
        x, y = zip(*(place for _, place in rows), strict=True)
        axes.scatter(x, y, marker=marker, c=colour, s=36, label=label)
        # Good methods lie side by side at the bottom: numbers in steps stay apart, and the names stand beside.
        names: dict[tuple[float, float], list[str]] = {}
        for row, place in sorted(rows, key=lambda item: item[1]):
            names.setdefault(place, []).append(row.name)
        for step, (place, shared) in enumerate(names.items()):
            key.append(f"{len(key) + 1}  {' / '.join(shared)}")
            offset = (0, 7 + 9 * (step % 3))
            axes.annotate(str(len(key)), place, textcoords="offset points", xytext=offset, fontsize=7, ha="center")
    axes.set_xscale("log")
    axes.set_ylim(-3, 112)
    axes.set_xlabel("KL(original || edited) on unseen text, nats per token (less is better)")
    axes.set_ylabel("texts over the run limit, % (less is better)")
    axes.set_title(f"{bench.setting.policy}: {bench.setting.texts} texts in one checkpoint", fontsize=9)
    axes.grid(alpha=0.3)
    if grey or any(row.figures is not None and row.kind in _MARKERS for row in bench.rows):
        axes.legend(fontsize=7)
        axes.text(1.02, 1.0, "\n".join(key), transform=axes.transAxes, fontsize=7, va="top", linespacing=1.6)
    try:
        figure.savefig(file, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise OutputError(f"{file}: the plot cannot be written ({error.strerror}).") from None


def _place(row: Row) -> tuple[float, float] | None:
    """Where a row stands: KL, and percent over the limit."""
    if row.figures is None or row.figures.kl is None:
        return None
    return max(row.figures.kl, LEAST_KL), 100 * row.figures.over_limit
