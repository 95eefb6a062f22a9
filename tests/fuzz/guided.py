"""One parser in a process of its own, whose code Atheris watches: inputs that reach new branches are changed further.

    python -m tests.fuzz.guided PARSER INPUTS SEED FOLDER

writes what it found into FOLDER: `tally.json`, and each input that escaped as a file. Atheris is an extra
(`pip install 'memscrub[fuzz]'`); without it `--engine plain` of `python -m tests.fuzz` needs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path

import atheris

# Our own modules and the parsers in Python beneath them.
WATCHED = ["memscrub", "tomllib", "tomli", "zipfile", "csv", "gzip", "securesystemslib", "numpy.lib"]
with atheris.instrument_imports(include=WATCHED):
    from tests.fuzz.engine import Tally, parser
    from tests.fuzz.mutators import MAX_SIZE


def main(name: str, inputs: int, seed: int, folder: Path) -> None:
    """Feed the parser so many inputs; does not return: libFuzzer ends the process, or we do."""
    warnings.simplefilter("ignore")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with atheris.instrument_imports(include=WATCHED):  # the seeds load what the parser needs
            tried = stack.enter_context(parser(name))
        tally = Tally()
        for number, data in enumerate(tried.seeds):
            (corpus / f"seed-{number}").write_bytes(data)
        begin = time.process_time()

        def test_one(data: bytes) -> None:
            new = tally.add(tried.attempt(data))
            if new or tally.inputs == inputs:
                tally.seconds = time.process_time() - begin
                _write(folder, tally)
            if tally.inputs == inputs:
                tried.close()
                os._exit(0)  # libFuzzer would go on until its own count is reached, and Python's end takes seconds

        def mutate(data: bytes, most: int, chance_seed: int) -> bytes:
            chance = random.Random(chance_seed)
            if chance.random() < 0.2:
                return bytes(atheris.Mutate(data, most))
            return tried.target.mutate(chance, data)[:most]

        options = [
            f"-seed={seed + 1}",
            f"-max_len={MAX_SIZE}",
            "-timeout=60",
            "-rss_limit_mb=0",
            "-print_final_stats=0",
        ]
        options += [f"-artifact_prefix={folder}/died-", "-len_control=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], test_one, custom_mutator=mutate)
        atheris.Fuzz()


def _write(folder: Path, tally: Tally) -> None:
    found = [{"what": e.what, "where": e.where, "file": e.name} for e in tally.escapes.values()]
    for escape in tally.escapes.values():
        (folder / escape.name).write_bytes(escape.data)
    counts = {"inputs": tally.inputs, "seconds": tally.seconds, "outcomes": len(tally.outcomes), "escapes": found}
    (folder / "tally.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
