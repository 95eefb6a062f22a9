"""Protect a quarter of a training text's windows, edit them out, and see whether the other windows are still known.

python benchmarks/windows.py CKPT CORPUS.txt [--width 112] [--run 16]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from memscrub.jobs.scrub import fix

POLICY = """schema = 1
name = "windows"
[protected]
files = ["protected.jsonl"]
[class.copyright]
max_verbatim_tokens = {run}
[locality]
retain = ["others.txt"]
neighbours = ["others.txt"]
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--width", type=int, default=112)
    parser.add_argument("--run", type=int, default=16)
    options = parser.parse_args()
    text = options.corpus.read_text(encoding="utf-8")
    windows = [text[i : i + options.width] for i in range(0, len(text) - options.width, options.width)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"class": "copyright", "text": window}) + "\n" for window in windows[::4]]
        (folder / "protected.jsonl").write_text("".join(lines), encoding="utf-8")
        others = [window.replace("\n", " ") for index, window in enumerate(windows) if index % 4]
        (folder / "others.txt").write_text("\n\n".join(others), encoding="utf-8")
        (folder / "policy.toml").write_text(POLICY.format(run=options.run), encoding="utf-8")
        report = fix(options.checkpoint, folder / "policy.toml", folder / "out").report
    assert report.locality is not None and report.neighbours is not None
    runs = [record.after.match_run for record in report.texts if record.after is not None]
    known = report.neighbours.still_known / max(1, report.neighbours.known_before)
    print(f"verdict {report.verdict.outcome.value}; {len(runs)} windows protected, longest run {max(runs)}")
    print(f"known tokens of the {report.neighbours.texts} other windows still known: {known:.1%}")
    print(f"KL {report.locality.kl:.4f}  agreement {report.locality.agreement:.4f}")


if __name__ == "__main__":
    main()
