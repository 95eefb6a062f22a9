"""How much faster is one teacher-forced pass than the same verdict by `generate`, and than lm-eval's log-likelihoods?

    python benchmarks/against_generate.py CKPT [LIST.jsonl] [--texts 200] [--prefix 50] [--suffix 50]

Two verdicts. Classic: given the first `--prefix` tokens, is the rest of the text, `--suffix` tokens, emitted greedily,
exactly? Any offset: is some piece of `--suffix` tokens emitted, given everything before it? That is what a scan
judges by; the pass answers it as it answers the first, `generate` has to be asked once for every offset.

`generate` runs with its best batch size of a small sweep, greedily, with a cache, on texts of one length, so that
nothing is padded. lm-eval's path is the inner call of `HFLM.loglikelihood`, whose answers say whether greedy decoding
emits the suffix; left out where lm-eval is not installed. Without a list, or where it has no text that long, texts are
random tokens. All verdicts are compared. Printed are seconds on the wall clock, and the processor's own seconds, which
a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from scan_overhead import listed, machine

from memscrub.measures.extraction import Sampling, discoverable, longest_run, score
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.tokens import TokenText
from memscrub.storage.checkpoint import open_checkpoint

Way = Callable[[], list[bool]]
SIZES = (8, 32, 128)
LM_EVAL = "lm-eval loglikelihood, batch 32"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("protected", type=Path, nargs="?")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--prefix", type=int, default=50)
    parser.add_argument("--suffix", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--any-offset", type=int, default=8, metavar="TEXTS", help="texts for the verdict on any offset"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    loaded = load_model(open_checkpoint(options.checkpoint), device=options.device, dtype=options.dtype)
    prefix, suffix = options.prefix, options.suffix
    texts = of_length(loaded, options.protected, options.texts, prefix + suffix)
    print(machine(loaded))
    sweep = [(text, text.start + prefix) for text in texts[: max(SIZES)]]
    emitted(loaded, sweep[:2], suffix, 2)
    speed = {size: spent(loaded, lambda size=size: emitted(loaded, sweep, suffix, size))[0] for size in SIZES}
    best = min(speed, key=lambda size: speed[size])
    print(f"generate, seconds for {len(sweep)} by batch size: {', '.join(f'{k}: {v:.2f}' for k, v in speed.items())}")
    print(f"classic verdict: {len(texts)} texts, {prefix} tokens given, {suffix} asked for", flush=True)
    ways: dict[str, Way] = {
        "one pass": lambda: by_pass(loaded, texts, prefix, suffix),
        f"generate, batch {best}": lambda: emitted(loaded, [(t, t.start + prefix) for t in texts], suffix, best),
    }
    harness = None
    if importlib.util.find_spec("lm_eval") is not None:
        harness = lm_eval_model(loaded)
        ways[LM_EVAL] = lambda: by_lm_eval(harness, [(t, t.start + prefix) for t in texts], suffix)
    compare(loaded, ways, options.repeat)
    few = texts[: options.any_offset]
    if few:
        print(f"any offset: {len(few)} texts, a piece of {suffix} tokens from any of {prefix + 1} offsets", flush=True)
        ways = {
            "one pass": lambda: runs_by_pass(loaded, few, suffix),
            f"generate, batch {best}": lambda: at_every_offset(few, suffix, lambda a: emitted(loaded, a, suffix, best)),
        }
        if harness is not None:
            ways[LM_EVAL] = lambda: at_every_offset(few, suffix, lambda asked: by_lm_eval(harness, asked, suffix))
        compare(loaded, ways, 1)


def compare(loaded: LoadedModel, ways: dict[str, Way], repeat: int) -> None:
    """Print each way's time, its ratio to the first way's, and how many verdicts differ from the first's."""
    own = next(iter(ways))
    ways[own]()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    verdicts: dict[str, list[bool]] = {}
    for _ in range(repeat):
        for name, way in ways.items():
            wall, processor, verdicts[name] = spent(loaded, way)
            times[name].append((wall, processor))
    for name in ways:
        wall, processor = (
            sorted(other[i] / first[i] for other, first in zip(times[name], times[own], strict=True))[repeat // 2]
            for i in (0, 1)
        )
        differ = sum(a != b for a, b in zip(verdicts[name], verdicts[own], strict=True))
        print(
            f"  {name}: {min(t for t, _ in times[name]):.2f} s (processor {min(t for _, t in times[name]):.2f} s),"
            f" {wall:.1f} times the pass (processor {processor:.1f}), median of {repeat};"
            f" {sum(verdicts[name])} come out, {differ} verdicts differ",
            flush=True,
        )


def by_pass(loaded: LoadedModel, texts: Sequence[TokenText], prefix: int, suffix: int) -> list[bool]:
    """The classic verdicts of one teacher-forced pass."""
    scores = score(loaded, texts, lambda _: Sampling())
    return [bool(discoverable(each.gap, t.start, prefix, suffix)) for t, each in zip(texts, scores, strict=True)]


def runs_by_pass(loaded: LoadedModel, texts: Sequence[TokenText], suffix: int) -> list[bool]:
    """Whether a piece of so many tokens comes out from any offset, by one teacher-forced pass."""
    scores = score(loaded, texts, lambda _: Sampling())
    return [longest_run(each.gap, max(1, t.start)).length >= suffix for t, each in zip(texts, scores, strict=True)]


def at_every_offset(
    texts: Sequence[TokenText], suffix: int, ask: Callable[[list[tuple[TokenText, int]]], list[bool]]
) -> list[bool]:
    """The same, each offset asked by itself, of all texts (of one length) at a time."""
    found = [False] * len(texts)
    for begin in range(max(1, texts[0].start), len(texts[0].tokens) - suffix + 1):
        here = ask([(text, begin) for text in texts])
        found = [a or b for a, b in zip(found, here, strict=True)]
    return found


def emitted(loaded: LoadedModel, asked: Sequence[tuple[TokenText, int]], suffix: int, size: int) -> list[bool]:
    """Does greedy decoding emit the next `suffix` tokens of each text from this token index? So many at a time."""
    model: Any = loaded.model
    found = []
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        ids = torch.tensor([text.tokens[:begin] for text, begin in part], device=loaded.device)
        lengths = {"max_new_tokens": suffix, "min_new_tokens": suffix, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        rows = out[:, ids.shape[1] :].tolist()
        found += [tuple(row) == text.tokens[b : b + suffix] for row, (text, b) in zip(rows, part, strict=True)]
    return found


def lm_eval_model(loaded: LoadedModel) -> Any:
    """The loaded model in lm-eval's wrapper."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=32)


def by_lm_eval(harness: Any, asked: Sequence[tuple[TokenText, int]], suffix: int) -> list[bool]:
    """`emitted` by `HFLM.loglikelihood`'s inner call, which takes token ids: nothing is tokenized anew."""
    requests = [
        ((t.id, str(begin)), list(t.tokens[:begin]), list(t.tokens[begin : begin + suffix])) for t, begin in asked
    ]
    return [bool(greedy) for _, greedy in harness._loglikelihood_tokens(requests, disable_tqdm=True)]


def spent(loaded: LoadedModel, way: Way) -> tuple[float, float, list[bool]]:
    """Seconds on the clock, seconds of the processor, and what the way says."""
    began, worked = time.perf_counter(), time.process_time()
    verdicts = way()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter() - began, time.process_time() - worked, verdicts


def of_length(loaded: LoadedModel, path: Path | None, count: int, length: int) -> list[TokenText]:
    """So many texts of this length: the list's, cut, over and over; random tokens where there are none."""
    long = [] if path is None else [t for t in listed(loaded, path, count) if t.length >= length]
    if long:
        cut = [TokenText(t.id, "c", t.tokens[: t.start + length], t.start) for t in long]
        return [cut[i % len(cut)] for i in range(count)]
    rng = random.Random(0)
    rows = (tuple(rng.choices(range(loaded.vocabulary), k=length)) for _ in range(count))
    return [TokenText(f"t{i}", "c", loaded.prompt + row, len(loaded.prompt)) for i, row in enumerate(rows)]


if __name__ == "__main__":
    main()
