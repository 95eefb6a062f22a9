"""How much slower is scoring protected texts than the bare forward pass over the same batches? Prints the ratio.

    python benchmarks/scan_overhead.py CKPT PROTECTED.jsonl [--repeat 7] [--copies 5]

Both run in turn in one process; the median of the pairwise ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from memscrub.checkpoint import open_checkpoint
from memscrub.extraction import Sampling, score
from memscrub.model import LoadedModel, load_model
from memscrub.protected import ProtectedText
from memscrub.tokens import TokenText, batches, pad, tokenize


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("protected", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--copies", type=int, default=5)
    options = parser.parse_args()
    loaded = load_model(open_checkpoint(options.checkpoint))
    texts = tokenize(loaded, _read(options.protected)) * options.copies
    bare(loaded, texts)
    pairs = []
    for _ in range(options.repeat):
        began = time.monotonic()
        bare(loaded, texts)
        middle = time.monotonic()
        score(loaded, texts, lambda _: Sampling())
        pairs.append((middle - began, time.monotonic() - middle))
    ratios = [pair[1] / pair[0] for pair in pairs]
    tokens = sum(len(text.tokens) for text in texts)
    print(f"{len(texts)} texts, {tokens} tokens, {torch.get_num_threads()} threads")
    forward, scored = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    print(f"bare forward {forward:.2f} s, scores {scored:.2f} s")
    print(f"ratio: min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")


def bare(loaded: LoadedModel, texts: tuple[TokenText, ...]) -> None:
    """The forward pass alone, in the batches that scoring uses."""
    for batch in batches([len(text.tokens) for text in texts], loaded.batch_tokens(8192)):
        with torch.inference_mode():
            loaded.logits(pad([texts[i].tokens for i in batch]))


def _read(path: Path) -> list[ProtectedText]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [ProtectedText(row["id"], row["text"], row["class"], (), None, None, str(path), 1) for row in rows]


if __name__ == "__main__":
    main()
