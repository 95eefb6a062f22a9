"""How the time of a joint edit grows with the number of texts: the same checkpoint, more and more texts protected.

    python benchmarks/bench_policy.py FOLDER --out bench-policy
    python benchmarks/scaling.py CKPT bench-policy/policy.toml --texts 50 100 200 500

Prints a Markdown row per number of texts, and the exponent b of seconds ~ n^b between the first and the last. The
seconds are the edit's alone, its statistics included: loading and measuring are not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_policy import in_proportion

from memscrub.jobs.editing import make_edit
from memscrub.jobs.ordinary_text import retain_halves
from memscrub.jobs.scanning import Inputs, open_inputs
from memscrub.locality.distance import compare
from memscrub.measures.extraction import NOISE, Sampling, longest_run, score


def main() -> None:
    """Edit once for every number of texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("policy")
    parser.add_argument("--texts", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    print(f"| texts | break points | rounds | over the limit | KL | agreement | perplexity | s, {threads} threads |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    seconds = [row(open_inputs(options.checkpoint, options.policy, dtype="float32"), n) for n in options.texts]
    if len(seconds) > 1:
        grown = math.log(seconds[-1] / seconds[0]) / math.log(options.texts[-1] / options.texts[0])
        print(f"\nseconds ~ n^{grown:.2f} from {options.texts[0]} to {options.texts[-1]} texts")


def row(inputs: Inputs, count: int) -> float:
    """Protect so many texts, of every class in proportion; print the row and return the seconds of the edit."""
    chosen = in_proportion(inputs.texts, [text.class_name for text in inputs.texts], count)
    inputs = replace(inputs, texts=tuple(chosen))
    halves = retain_halves(inputs)
    began = time.perf_counter()
    edit = make_edit(inputs, halves)
    took = time.perf_counter() - began
    locality = compare(inputs.loaded, edit.editable.originals, halves.judge)
    noise = NOISE[inputs.loaded.dtype]
    over = 0
    for text, scores in zip(inputs.texts, score(inputs.loaded, inputs.texts, lambda _: Sampling()), strict=True):
        limit = inputs.policy.classes[text.class_name].max_verbatim_tokens
        run = longest_run(scores.gap, text.first_judged(inputs.policy.probe.min_prefix_tokens), -noise)
        over += limit is not None and run.length > limit
    print(
        f"| {len(inputs.texts)} | {edit.made.outcome.break_points} | {edit.made.rounds} | {over} | {locality.kl:.5f}"
        f" | {locality.agreement:.3f} | {locality.perplexity_ratio:.4f} | {took:.0f} |",
        flush=True,
    )
    return took


if __name__ == "__main__":
    main()
