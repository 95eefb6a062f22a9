"""How much slower is mining a corpus than the bare forward pass over the same windows? Prints the ratio.

    python benchmarks/mine_speed.py CKPT CORPUS [--repeat 5] [--device cpu] [--dtype float32] [--window 512]

Mining is all of it: reading the files, tokenizing, the passes, the journal, sifting, trying the entries, writing the
list. The bare pass is handed the windows' tokens as they are and looks at nothing that comes out. Both run in turn in
one process; the median of the pairwise ratios is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memscrub.mining.mine import Mined, Settings, mine_loaded
from memscrub.mining.reading import Reading, lots_of
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.tokens import batches, pad
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.texts.corpora import CorpusFile, find_files


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=64)
    options = parser.parse_args()
    loaded = load_model(open_checkpoint(options.checkpoint), device=options.device, dtype=options.dtype)
    settings, files = Settings(window=options.window, overlap=options.overlap), find_files(options.corpus)
    lots = windows_of(loaded, files, settings)
    tokens = sum(len(row) for rows in lots for row in rows)
    bare(loaded, lots[:1], settings)
    pairs = []
    for number in range(options.repeat):
        # Which comes first changes from pair to pair: neither gains from a warm cache.
        runs: list[Callable[[], object]] = [
            lambda: bare(loaded, lots, settings),
            lambda: mined(loaded, files, settings),
        ]
        order = (0, 1) if number % 2 == 0 else (1, 0)
        seconds = [0.0, 0.0]
        for which in order:
            began = time.perf_counter()
            runs[which]()
            seconds[which] = time.perf_counter() - began
        pairs.append((seconds[0], seconds[1]))
    found = mined(loaded, files, settings)
    ratios = [forward / whole for forward, whole in pairs]
    forward, whole = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    print(
        f"{found.funnel.documents} documents, {found.funnel.tokens} tokens; {tokens} in {found.funnel.windows} windows"
    )
    print(f"{found.funnel.kept} texts found; {loaded.device}, {loaded.dtype}, {torch.get_num_threads()} threads")
    print(f"bare forward {forward:.2f} s ({tokens / forward:.0f} tokens/s), mine {whole:.2f} s")
    print(f"mine at {statistics.median(ratios):.0%} of the bare forward (min {min(ratios):.0%}, max {max(ratios):.0%})")


def windows_of(loaded: LoadedModel, files: tuple[CorpusFile, ...], settings: Settings) -> list[list[list[int]]]:
    """Token ids of all windows, in the lots that mining reads them in."""
    reading = Reading(loaded, settings.windows(loaded), settings.text_column, settings.batch_tokens)
    return [[row.tokens for _, row in lot.rows] for lot in lots_of(reading, files, 0, (0, 0))]


def bare(loaded: LoadedModel, lots: list[list[list[int]]], settings: Settings) -> None:
    """The forward pass alone, logits of every position included."""
    for rows in lots:
        for batch in batches([len(row) for row in rows], loaded.batch_tokens(settings.batch_tokens)):
            with torch.inference_mode():
                loaded.logits(pad([rows[i] for i in batch]))
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()


def mined(loaded: LoadedModel, files: tuple[CorpusFile, ...], settings: Settings) -> Mined:
    """The whole of mining, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return mine_loaded(loaded, files, 0, Path(folder, "mined.jsonl"), {}, settings=settings)


if __name__ == "__main__":
    main()
