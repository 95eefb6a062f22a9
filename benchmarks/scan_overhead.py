"""How much slower is a scan than the bare forward pass over the same tokens, and how much memory does a text take?

    python benchmarks/scan_overhead.py CKPT [LIST.jsonl] [--texts 100 1000 10000] [--memory 1000 10000 100000]

A scan is everything after tokenization but decoding: the teacher-forced pass, every measure, judgement, records and
verdict. The bare pass computes all logits, in batches of the same kind, and looks at none. Both run in turn in one
process; the median of the pairwise ratios counts, of the wall clock's seconds and of the processor's, which a busy
machine disturbs less. Without a list the texts are random tokens, 40 to 80 each.

`--memory` starts a process per size and prints how its resident memory grew, by what: the list (60 words a text), its
token ids, the measures, what the pass needs besides at its peak, and the records of the report. `--prefix` compares
continuations of one prefix with and without sharing it. `--clean` measures windows of ordinary text, near-verbatim
continuations included, which are decoded only where needed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from memscrub.jobs.records import text_records
from memscrub.measures.extraction import Sampling, ScoreReader, score
from memscrub.measures.measure import measure
from memscrub.measures.passes import shared_prefix_forced, teacher_forced
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.tokens import TokenText, batches, pad, tokenize
from memscrub.policy.document import Policy, parse_policy
from memscrub.reports.standing import judged
from memscrub.reports.verdict import decide
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.texts.protected import ProtectedText

POLICY = """schema = 1
name = "overhead"
[protected]
files = ["p.jsonl"]
[class.c]
max_verbatim_tokens = 16
max_sampling_probability = 1e-4
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("protected", type=Path, nargs="?")
    parser.add_argument("--texts", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--memory", type=int, nargs="*", default=[])
    parser.add_argument("--prefix", type=int, nargs="*", default=[])
    parser.add_argument("--clean", type=Path, help="ordinary text; how much does near-verbatim cost on it?")
    parser.add_argument("--windows", type=int, default=1000, help="texts of 100 tokens for --clean")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--grown", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    loaded = load_model(open_checkpoint(options.checkpoint), device=options.device, dtype=options.dtype)
    if options.grown is not None:
        print(json.dumps(grown(loaded, options.grown)))
        return
    print(machine(loaded))
    for count in options.texts:
        overhead(loaded, listed(loaded, options.protected, count), options.repeat)
    if options.clean is not None:
        clean(loaded, options.clean.read_text(encoding="utf-8"), options.windows, options.repeat)
    for length in options.prefix:
        sharing(loaded, length, options.repeat)
    for count in options.memory:
        own = [sys.executable, __file__, *sys.argv[1:], "--grown", str(count)]
        print(memory_line(json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)))


def machine(loaded: LoadedModel) -> str:
    """The machine and the versions, in one line."""
    threads = f"{torch.get_num_threads()} threads of {torch.multiprocessing.cpu_count()} cores"
    device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else loaded.device.type
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {loaded.dtype}, {threads}, {versions}"


def overhead(loaded: LoadedModel, texts: Sequence[TokenText], repeat: int) -> None:
    """Print the ratio of a scan's time to the bare pass's."""
    policy = parse_policy(POLICY.encode())
    bare(loaded, texts[:100])
    scan(loaded, policy, texts[:100])
    pairs = []
    for _ in range(repeat):
        began, worked = now(loaded), time.process_time()
        bare(loaded, texts)
        middle, half = now(loaded), time.process_time()
        scan(loaded, policy, texts)
        pairs.append((middle - began, now(loaded) - middle, half - worked, time.process_time() - half))
    ratios = [pair[1] / pair[0] for pair in pairs]
    processor = statistics.median(pair[3] / pair[2] for pair in pairs)
    tokens = sum(len(text.tokens) for text in texts)
    forward, scanned = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    print(
        f"{len(texts)} texts, {tokens} tokens: bare forward {forward:.2f} s ({tokens / forward:.0f} tokens/s),"
        f" scan {scanned:.2f} s; ratio min {min(ratios):.2f}, median {statistics.median(ratios):.2f},"
        f" max {max(ratios):.2f} of {repeat}; of the processor's seconds, median {processor:.2f}",
        flush=True,
    )


def bare(loaded: LoadedModel, texts: Sequence[TokenText]) -> None:
    """The forward pass alone, all logits of every batch."""
    for batch in batches([len(text.tokens) for text in texts], loaded.batch_tokens(8192)):
        with torch.inference_mode():
            loaded.logits(pad([texts[i].tokens for i in batch]))


def scan(loaded: LoadedModel, policy: Policy, texts: Sequence[TokenText]) -> None:
    """Measures, judgements, records and verdict."""
    measured = measure(loaded, policy, texts, screen=True, keep_continuations=False)
    decide(judged(text_records(policy, texts, measured.measures)))


def clean(loaded: LoadedModel, text: str, count: int, repeat: int) -> None:
    """Print the ratio of a whole measure, near-verbatim included, to the teacher-forced pass alone."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - 100, 100)[:count]
    texts = [TokenText(f"w{i}", "c", loaded.prompt + tuple(ids[i : i + 100]), len(loaded.prompt)) for i in starts]
    policy = parse_policy((POLICY + "max_near_verbatim = 0.6\n").encode())
    for screen in (False, True):
        _clean(loaded, policy, texts, repeat, screen=screen)


def _clean(loaded: LoadedModel, policy: Policy, texts: Sequence[TokenText], repeat: int, *, screen: bool) -> None:
    pairs, decoded = [], 0
    for _ in range(repeat):
        began, worked = now(loaded), time.process_time()
        score(loaded, texts, lambda _: Sampling())
        middle, half = now(loaded), time.process_time()
        decoded = len(measure(loaded, policy, texts, screen=screen).continuations)
        pairs.append((middle - began, now(loaded) - middle, half - worked, time.process_time() - half))
    wall, processor = (statistics.median(pair[i + 1] / pair[i] for pair in pairs) for i in (0, 2))
    print(
        f"clean, {'screened' if screen else 'all decoded'}: {len(texts)} texts of 100 tokens, limit 0.6:"
        f" {decoded} of {3 * len(texts)} openings decoded; whole"
        f" measure {wall:.2f} times the teacher-forced pass (processor {processor:.2f}), median of {repeat}",
        flush=True,
    )


def sharing(loaded: LoadedModel, length: int, repeat: int) -> None:
    """Print what sharing a prefix of this length gains for 256 continuations of 16 tokens."""
    rng = random.Random(0)
    prefix, *rest = (tuple(rng.choices(range(loaded.vocabulary), k=n)) for n in (length, *[16] * 256))
    whole = [TokenText(str(i), "c", prefix + row, length) for i, row in enumerate(rest)]
    reader, ratios = ScoreReader(Sampling()), []
    for _ in range(repeat + 1):
        began = now(loaded)
        teacher_forced(loaded, whole, lambda _: reader, first_of=lambda text: text.start)
        middle = now(loaded)
        shared_prefix_forced(loaded, prefix, rest, reader)
        ratios.append((middle - began) / (now(loaded) - middle))
    print(f"prefix {length}, 256 continuations of 16: {statistics.median(ratios[1:]):.1f} times as fast shared")


def now(loaded: LoadedModel) -> float:
    """Seconds on a clock, once the device has done what it was asked."""
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter()


def listed(loaded: LoadedModel, path: Path | None, count: int) -> tuple[TokenText, ...]:
    """So many texts: the list's, over and over, or random tokens."""
    if path is None:
        rng = random.Random(0)
        return tuple(
            TokenText(
                f"t{i}", "c", loaded.prompt + tuple(rng.choices(range(loaded.vocabulary), k=rng.randint(40, 80))), 1
            )
            for i in range(count)
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = tokenize(loaded, [ProtectedText(row["id"], row["text"], "c", (), None, None, str(path), 1) for row in rows])
    return tuple(texts[i % len(texts)] for i in range(count))


def grown(loaded: LoadedModel, count: int) -> dict[str, float]:
    """Megabytes by which memory grows with a list of so many texts, with their measures, and with their records."""
    policy = parse_policy(POLICY.encode())
    scan(loaded, policy, listed(loaded, None, 100))  # buffers of the first batches
    rng = random.Random(0)
    words = [word for i in range(loaded.vocabulary) if (word := loaded.tokenizer.decode([i]).strip()).isalnum()]
    before = resident()
    entries = [
        ProtectedText(f"text-{i}", " ".join(rng.choices(words, k=60)), "c", (), None, None, "list.jsonl", i)
        for i in range(count)
    ]
    listing = resident()
    texts = tokenize(loaded, entries)
    held = resident()
    measures = measure(loaded, policy, texts, screen=True, keep_continuations=False).measures
    measured, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    records = text_records(policy, texts, measures)
    decide(judged(records))
    return {
        "texts": count,
        "tokens": sum(len(text.tokens) for text in texts),
        "list": listing - before,
        "token ids": held - listing,
        "measures": measured - held,
        "working memory of the pass": peak - measured,
        "records and judgements": resident() - measured,
    }


def resident() -> float:
    """Megabytes of resident memory, now."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * resource.getpagesize() / 2**20


def memory_line(found: dict[str, float]) -> str:
    """What `grown` found, in words."""
    count, tokens, *sizes = found.items()
    parts = [f"{name} {size:.0f} MB ({size * 2**20 / count[1]:.0f} bytes a text)" for name, size in sizes]
    return f"{count[1]:.0f} texts, {tokens[1] / count[1]:.0f} tokens each: " + ", ".join(parts)


if __name__ == "__main__":
    main()
