"""Is every changed byte of a signed directory found? Changes one byte at a time, and verifies each time.

    python benchmarks/flips.py DIR --key PUB [--patch FILE] [--weights 10000] [--only NAME] [--seed 0]

DIR is copied first. Every byte of every file but the weights is changed in nine ways: each of its eight bits, and one
random other value. Signature files also lose each byte once, gain a blank before each byte, and gain a byte at the
end. Of the weights, as many bytes as `--weights` says, drawn at random, are changed in one bit each. Found means that
`memscrub verify` ends with exit code 5 (`memscrub apply` and `revert` with 2 or 5 for the patch); what verifies is
missed, and any other error stops the run. Prints a Markdown table; ends with 1 if anything was missed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from memscrub.errors import MemscrubError, SignatureInvalidError
from memscrub.proof.signing import verify_directory
from memscrub.proof.statements import UNSIGNED_FILES
from memscrub.storage.patch import open_patch

WEIGHTS = ".safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--patch", type=Path)
    parser.add_argument("--weights", type=int, default=10_000)
    parser.add_argument("--only", help="this one file of DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    missed = 0
    print("| file | bytes | changes | found | missed | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(shutil.copytree(options.directory, Path(scratch) / "copy"))
        key = options.key.resolve()
        verify_directory(root, key)  # as it is, it must verify
        files = sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            name = path.relative_to(root).as_posix()
            if options.only not in (None, name):
                continue
            missed += row(name, path, changes(path, name, options), lambda: found_by_verify(root, key))
        verify_directory(root, key)
        if options.patch is not None:
            patch = Path(shutil.copy(options.patch, Path(scratch) / "patch"))
            missed += row("the patch", patch, changes(patch, "patch", options), lambda: found_by_open(patch))
    return 1 if missed else 0


def changes(path: Path, name: str, options: argparse.Namespace) -> Iterator[bytes]:
    """The file's content with one byte changed, in every way that the page above lists."""
    data = path.read_bytes()
    draw = random.Random(f"{options.seed} {name}")
    if name.endswith(WEIGHTS):
        for position in (draw.randrange(len(data)) for _ in range(options.weights)):
            yield replaced(data, position, data[position] ^ (1 << draw.randrange(8)))
        return
    for position, byte in enumerate(data):
        for bit in range(8):
            yield replaced(data, position, byte ^ (1 << bit))
        yield replaced(data, position, (byte + draw.randrange(1, 256)) % 256)
    if name in UNSIGNED_FILES:
        for position in range(len(data)):
            yield data[:position] + data[position + 1 :]
            yield data[:position] + b" " + data[position:]
        yield from (data + tail for tail in (b" ", b"\n", b"\0", b"}"))


def replaced(data: bytes, position: int, byte: int) -> bytes:
    return data[:position] + bytes([byte]) + data[position + 1 :]


def row(name: str, path: Path, contents: Iterator[bytes], is_found: Callable[[], bool]) -> int:
    """Try all contents of one file, put the original back, print what came of it; how many were missed."""
    original, start = path.read_bytes(), time.perf_counter()
    count = missed = 0
    for content in contents:
        path.write_bytes(content)
        count += 1
        missed += not is_found()
    path.write_bytes(original)
    seconds = time.perf_counter() - start
    print(f"| `{name}` | {len(original)} | {count} | {count - missed} | {missed} | {seconds:.0f} |", flush=True)
    return missed


def found_by_verify(root: Path, key: Path) -> bool:
    try:
        verify_directory(root, key, workers=1)
    except SignatureInvalidError:
        return True
    return False


def found_by_open(patch: Path) -> bool:
    try:
        open_patch(patch)
    except MemscrubError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
