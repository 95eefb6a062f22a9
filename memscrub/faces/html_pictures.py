"""The page's two pictures as coordinates: success against locality, and where an edit went; knows no markup.

Lengths are SVG units. A picture's figures stand in a table beside it, so that nothing is told by a picture alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from memscrub.faces.html_view import ClassRow, number
from memscrub.reports.report import EditRecord, LocalityRecord, TensorRecord

# The plane of the first picture: its frame, and the room for labels right of it.
LEFT, TOP, WIDTH, HEIGHT = 46.0, 16.0, 330.0, 210.0
_LABEL = 17.0
# The second picture: a cell's height, how wide a panel is, and how many tensors fit.
ROW, PANEL, MOST_ROWS = 11.0, 256.0, 384
LEVELS = 8


@dataclass(frozen=True)
class Path:
    """One class's way from before the edit to after it, and where its label stands."""

    name: str
    before: float
    after: float
    x: float
    label: float
    share_before: str
    share_after: str


@dataclass(frozen=True)
class Plane:
    """Success against locality: to the right the distance from the original, upward the share within the policy."""

    x: float
    limit: float | None
    kl: str
    allowed: str
    ticks: tuple[tuple[float, str], ...]
    paths: tuple[Path, ...]


def plane(classes: Sequence[ClassRow], locality: LocalityRecord | None) -> Plane | None:
    """The first picture; None where nothing was edited, so that there is neither before nor distance."""
    rows = [row for row in classes if row.bad_before is not None and row.texts]
    if locality is None or not rows:
        return None
    bounded = 0 < locality.max_kl < math.inf
    most = max(locality.kl, locality.max_kl if bounded else 0.0) * 1.12
    if not 1e-12 < most < 1e12:  # nothing that a model could have
        return None

    def across(kl: float) -> float:
        return round(LEFT + WIDTH * max(kl, 0.0) / most, 1)

    x = across(locality.kl)
    ends = [_up(row.texts - row.bad, row.texts) for row in rows]
    labels = _spread(ends)
    paths = [
        Path(
            row.name,
            _up(row.texts - (row.bad_before or 0), row.texts),
            end,
            x,
            label,
            f"{row.texts - (row.bad_before or 0):,} of {row.texts:,}",
            f"{row.texts - row.bad:,} of {row.texts:,}",
        )
        for row, end, label in zip(rows, ends, labels, strict=True)
    ]
    step = _step(most)
    ticks = tuple((across(i * step), f"{i * step:.3g}") for i in range(int(most / step) + 1))
    limit = across(locality.max_kl) if bounded else None
    return Plane(x, limit, number(locality.kl), number(locality.max_kl), ticks, tuple(paths))


def _up(part: int, whole: int) -> float:
    return round(TOP + HEIGHT * (1 - part / whole), 1)


def _spread(ends: Sequence[float]) -> list[float]:
    """Heights for labels, each at least a line below the one above it and all inside the frame where they fit."""
    order = sorted(range(len(ends)), key=lambda index: ends[index])
    heights, last = [0.0] * len(ends), -math.inf
    for index in order:
        last = heights[index] = max(ends[index], last + _LABEL)
    over = last - (TOP + HEIGHT)
    lift = min(over, min(heights) - TOP) if over > 0 and heights else 0.0
    return [round(height - lift, 1) for height in heights]


def _step(most: float) -> float:
    """A round distance between ticks, for three to six of them."""
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)


@dataclass(frozen=True)
class Band:
    """One tensor in the map: its row's label, and how many vectors changed by how much."""

    label: str
    name: str
    top: float
    changed: str
    mean: str
    most: str


@dataclass(frozen=True)
class Panel:
    """The tensors of one kind, a row each; `levels` are the outlines of cells of one strength, weakest first."""

    title: str
    vectors: int
    height: float
    bands: tuple[Band, ...]
    levels: tuple[str, ...]


@dataclass(frozen=True)
class EditMap:
    """Where the edit went; `scale` are the upper ends of the levels, in words. `left_out`: rows that did not fit."""

    panels: tuple[Panel, ...]
    scale: tuple[str, ...]
    left_out: int


def edit_map(edit: EditRecord | None) -> EditMap | None:
    """The second picture; None where the report does not say how much each tensor changed."""
    tensors = [] if edit is None else [tensor for tensor in edit.tensors if tensor.change]
    if not tensors:
        return None
    chosen = sorted(tensors, key=lambda tensor: -max(tensor.change))[:MOST_ROWS]
    most = max(max(tensor.change) for tensor in chosen) or 1.0
    groups: dict[str, list[TensorRecord]] = {}
    for tensor in sorted(chosen, key=lambda tensor: _place(tensor.name)):
        groups.setdefault(_kind(tensor.name), []).append(tensor)
    panels = tuple(_panel(title, group, most) for title, group in groups.items())
    scale = tuple(f"{most * ((level + 1) / LEVELS) ** 2:.1%}" for level in range(LEVELS))
    return EditMap(panels, scale, len(tensors) - len(chosen))


def _place(name: str) -> tuple[str, list[tuple[int, str]], str]:
    # Numbers by their length, then as text: one without end is no number to Python.
    numbers = [digits.lstrip("0") for digits in re.findall(r"\d+", name)]
    return _kind(name), [(len(digits), digits) for digits in numbers], name


def _kind(name: str) -> str:
    """The last two parts of a tensor's name that are no numbers: `mlp.down_proj`."""
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    return ".".join(parts[-2:])


def _panel(title: str, tensors: Sequence[TensorRecord], most: float) -> Panel:
    outlines: list[list[str]] = [[] for _ in range(LEVELS)]
    bands = []
    for index, tensor in enumerate(tensors):
        top = index * ROW
        width = PANEL / len(tensor.change)
        for begin, end, level in _runs([_level(value, most) for value in tensor.change]):
            if level < 0:
                continue
            x, long = round(begin * width, 1), round((end - begin) * width, 1)
            outlines[level].append(f"M{x:g} {top:g}h{long:g}v{ROW - 1:g}h-{long:g}z")
        numbers = re.findall(r"\d+", tensor.name)
        mean = math.sqrt(sum(value * value for value in tensor.change) / len(tensor.change))
        bands.append(
            Band(
                label=".".join(numbers) or tensor.name,
                name=tensor.name,
                top=top,
                changed=f"{tensor.vectors_changed:,} of {tensor.vectors or 0:,}",
                mean=f"{mean:.2%}",
                most=f"{max(tensor.change):.2%}",
            )
        )
    vectors = max(tensor.vectors or 0 for tensor in tensors)
    return Panel(title, vectors, len(tensors) * ROW, tuple(bands), tuple("".join(each) for each in outlines))


def _level(value: float, most: float) -> int:
    """The strength of a cell; -1 where nothing changed. By square roots: most of an edit is in few places."""
    if value <= 0:
        return -1
    return int(LEVELS * math.sqrt(value / most)) if value < most else LEVELS - 1


def _runs(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring cells of one level as (begin, end, level)."""
    runs: list[tuple[int, int, int]] = []
    for index, level in enumerate(levels):
        if runs and runs[-1][2] == level:
            runs[-1] = runs[-1][0], index + 1, level
        else:
            runs.append((index, index + 1, level))
    return runs
