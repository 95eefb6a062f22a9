"""A bench on a terminal: its tables, readable at 80 columns; shows what the bench says and decides nothing."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscrub.bench.table import Bench, Grid, grids, notes


def show_bench(console: Console, bench: Bench) -> None:
    """How it was made, the fine-tuning grid, the tables, and how to read them."""
    setting = bench.setting
    console.print(Text(f"memscrub bench: {setting.checkpoint}", style="bold", overflow="fold"))
    console.print(
        Text(
            f"policy {setting.policy}, {setting.texts} texts, sites {setting.sites}, {setting.device},"
            f" {setting.threads} threads, torch {setting.torch}, seed {setting.seed}"
        )
    )
    if bench.grid:
        console.print(Text(f"fine-tuning grid ({len(bench.grid)} runs):"))
        for line in bench.grid:
            console.print(Text(f"  {line}", style="dim"))
    said: set[str] = set()
    for grid in grids(bench):
        console.print(_table(grid))
        for reason in (reason for reason in _reasons(grid) if reason not in said):
            console.print(Text(reason, style="red"))
            said.add(reason)
    for note in notes(bench):
        console.print(Text(note, style="dim"))


def _table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column(grid.headers[0], overflow="fold", min_width=18, max_width=30)
    for header in grid.headers[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    for cells in grid.cells:
        table.add_row(*(Text(_short(cell) if number else cell) for number, cell in enumerate(cells)))
    return table


def _reasons(grid: Grid) -> list[str]:
    """Why rows have no figures: sentences, which stand below a table because they would push it off the screen."""
    return [f"{cells[0]}: {cell}" for cells in grid.cells for cell in cells[1:] if _short(cell) != cell]


def _short(cell: str) -> str:
    for beginning, word in (("diverged: ", "diverged"), ("not possible: ", "n/a"), ("no text ", "n/a")):
        if cell.startswith(beginning):
            return word
    return cell
