"""A stored report as it looks in a terminal of 80 columns, as an SVG picture for the docs.

python benchmarks/terminal_picture.py memscrub-demo/scrubbed/memscrub-report.json --out docs/terminal-fix.svg
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from memscrub.cli.console import show_report
from memscrub.reports.report import load_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="memscrub report")
    given = parser.parse_args()
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    show_report(console, load_report(given.report))
    console.save_svg(str(given.out), title=given.title)


if __name__ == "__main__":
    main()
