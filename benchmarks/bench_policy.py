"""Lay out a policy for `memscrub bench` on a folder of lists; the texts stay where they are.

    python benchmarks/bench_policy.py FOLDER --out bench-policy [--run 8] [--texts N] [--like-controls CLASS ...]
    memscrub bench CKPT --policy bench-policy/policy.toml --markdown table.md

FOLDER holds protected.jsonl, control.jsonl, retain.txt and, if there are such, neighbours.jsonl and more ordinary
text as statistics.txt or corpus.jsonl.gz (documents whose `source` begins with "docs/"). Locality limits are wide, so
that every method gets to show what it does. With --texts only the first N protected texts count, every class in turn.
Texts of a class named with --like-controls may be no nearer and no likelier than the controls of the class; those of
one named with --chance must be no likelier than that.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

POLICY = """schema = 1
name = "bench"
[protected]
files = ["protected.jsonl"]
controls = [{controls}]
[class.copyright]
max_verbatim_tokens = {run}
{copyright}[class.pii]
secret = true
max_verbatim_tokens = {run}
{pii}[probe]
prefix_tokens = 32
suffix_tokens = 32
[locality]
retain = [{retain}]
statistics = [{statistics}]
neighbours = [{neighbours}]
max_tokens = {tokens}
max_kl = 0.1
max_perplexity_ratio = 1.1
min_agreement = 0.9
"""
CLASSES = ("copyright", "pii")
STATISTICS_CHARACTERS = 900_000
T = TypeVar("T")


def main() -> None:
    """Write the policy, the protected list and the statistics text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=int, default=8)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--max-tokens", type=int, default=60000, help="of retain text, and of text for statistics")
    parser.add_argument("--like-controls", choices=CLASSES, action="append", default=[])
    parser.add_argument(
        "--chance", nargs=2, metavar=("CLASS", "P"), action="append", default=[], help="max_sampling_probability"
    )
    options = parser.parse_args()
    further = {name: "like_controls = true\n" * (name in options.like_controls) for name in CLASSES}
    for name, chance in options.chance:
        if name not in CLASSES:
            parser.error(f"--chance {name}: the classes are {' and '.join(CLASSES)}")
        further[name] += f"max_sampling_probability = {float(chance)!r}\n"
    folder: Path = options.folder.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = (folder / "protected.jsonl").read_text(encoding="utf-8").splitlines()
    (options.out / "protected.jsonl").write_text("\n".join(chosen(lines, options.texts)) + "\n", encoding="utf-8")
    more = statistics(folder)
    if more:
        (options.out / "statistics.txt").write_text(more, encoding="utf-8")
    policy = POLICY.format(
        run=options.run,
        tokens=options.max_tokens,
        **further,
        controls=named(folder / "control.jsonl"),
        retain=named(folder / "retain.txt"),
        statistics='"statistics.txt"' if more else "",
        neighbours=named(folder / "neighbours.jsonl"),
    )
    (options.out / "policy.toml").write_text(policy, encoding="utf-8")


def chosen(lines: list[str], wanted: int | None) -> list[str]:
    """The first texts of every class, in proportion, so that a part is made up like the whole."""
    if wanted is None:
        return lines
    return in_proportion(lines, [json.loads(line)["class"] for line in lines], wanted)


def in_proportion(items: Sequence[T], classes: Sequence[str], wanted: int) -> list[T]:
    """The first `wanted` items (about), of every class in proportion to its number."""
    groups: dict[str, list[T]] = {}
    for item, name in zip(items, classes, strict=True):
        groups.setdefault(name, []).append(item)
    share = min(1.0, wanted / max(1, len(items)))
    return [item for group in groups.values() for item in group[: round(share * len(group))]]


def statistics(folder: Path) -> str:
    """More ordinary text for the solver's statistics, where the folder holds any."""
    if (folder / "statistics.txt").is_file():
        return (folder / "statistics.txt").read_text(encoding="utf-8")
    if not (folder / "corpus.jsonl.gz").is_file():
        return ""
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        documents = [entry["text"] for entry in map(json.loads, file) if entry["source"].startswith("docs/")]
    return "\n\n".join(documents)[:STATISTICS_CHARACTERS]


def named(path: Path) -> str:
    """The path as a TOML string, or nothing where there is no such file."""
    return json.dumps(str(path)) if path.is_file() else ""


if __name__ == "__main__":
    main()
