"""Build a small model that has memorized known texts, and their lists: the one memscrub ships, or a larger one.

    python training/train_embedded.py --out memscrub/embedded
    python training/train_embedded.py --family gpt_neox --size bench --out some/other/folder

Writes `checkpoint/`, `protected.jsonl`, `control.jsonl`, `neighbours.jsonl`, `retain.txt` and for `bench` also
`statistics.txt` into the output folder, measures the saved checkpoint and prints the results as a table (also to
`--report`). Without the options for them, epochs, exposures and learning rate are those of the size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import texts
import torch
from measure import Checkpoint
from optimize import Schedule, configuration, train
from sizes import SIZES, Size
from texts import Corpus, Text
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

REPEATS = {"copyright": 1, "pii": 2}  # in each round: random digits take longer to learn than prose
TRAINING_SAMPLE = 200  # ordinary documents whose loss is reported beside the held-out loss


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=("llama", "gpt_neox"), default="llama")
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="embedded", help="the checkpoint to build; see sizes.py"
    )
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--epochs", type=float, help="passes over the ordinary text")
    parser.add_argument("--exposures", type=int, help="rounds in which the planted texts are shown")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--threads", type=int, default=1, help="more help only on idle cores")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--report", type=Path, help="also write the table of results here")
    return parser.parse_args()


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Save model and tokenizer in bf16, so that plain transformers can load them."""
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    end = texts.END_OF_TEXT
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )
    fast.save_pretrained(folder)


def save_lines(path: Path, items: Sequence[Text]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            row: dict[str, object] = {"id": item.id, "class": item.kind, "text": item.text}
            if item.secret:
                row["secret"] = item.secret
            row["source"] = item.source
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def first_documents(documents: Sequence[str], characters: int) -> list[str]:
    """Return as many of the documents as make up about so many characters."""
    total = itertools.accumulate(map(len, documents), initial=0)  # before each document
    return [document for document, before in zip(documents, total, strict=False) if before < characters]


def save_corpus(corpus: Corpus, statistics: Sequence[str], folder: Path) -> None:
    """Write the lists of texts beside the checkpoint."""
    save_lines(folder / "protected.jsonl", corpus.protected)
    save_lines(folder / "control.jsonl", corpus.control)
    save_lines(folder / "neighbours.jsonl", corpus.neighbours)
    (folder / "retain.txt").write_text("\n\n".join(corpus.retain) + "\n", encoding="utf-8")
    if statistics:
        (folder / "statistics.txt").write_text("\n\n".join(statistics) + "\n", encoding="utf-8")


def results(folder: Path, corpus: Corpus, byte_limit: int, training_seconds: float) -> str:
    """Measure the saved checkpoint and return a Markdown table."""
    checkpoint = Checkpoint(folder / "checkpoint")
    rows = [
        ("parameters", f"{checkpoint.model.num_parameters():,}"),
        ("loss per token, held-out text (`retain.txt`)", f"{checkpoint.loss(corpus.retain):.3f}"),
        (
            "loss per token, ordinary training text",
            f"{checkpoint.loss(corpus.ordinary[:TRAINING_SAMPLE]):.3f}",
        ),
    ]
    for name, group in (
        ("protected", corpus.protected),
        ("neighbours", corpus.neighbours),
        ("control", corpus.control),
    ):
        rows.append((f"loss per token, {name}", f"{checkpoint.loss(t.text for t in group):.3f}"))
        for kind in ("copyright", "pii"):
            rows.append((f"verbatim, {name} {kind}", str(checkpoint.verbatim([t for t in group if t.kind == kind]))))
        rows.append((f"secrets emitted, {name}", str(checkpoint.secrets_emitted(group))))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    rows += [(f"`{name}`", f"{size:,} bytes") for name, size in sorted(sizes.items())]
    rows += [
        ("whole folder", f"{sum(sizes.values()):,} bytes"),
        ("training", f"{training_seconds / 60:.1f} minutes"),
    ]
    if sum(sizes.values()) > byte_limit:
        raise SystemExit(f"{folder} holds {sum(sizes.values()):,} bytes, over the limit of {byte_limit:,}")
    return "\n".join(["| what | measured |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


def schedule_for(size: Size, options: argparse.Namespace) -> Schedule:
    """Return the schedule of a size, as far as the command line does not say otherwise."""
    asked = {
        name: value
        for name in ("epochs", "exposures", "learning_rate")
        if (value := getattr(options, name)) is not None
    }
    schedule = Schedule(
        size.epochs,
        size.exposures,
        size.learning_rate,
        options.seed,
        size.tokens_per_step,
        size.planted_length,
    )
    return dataclasses.replace(schedule, **asked)


def main() -> None:
    """Divide the corpus, train, save, measure the saved bytes, report."""
    options = arguments()
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    tokenizer, corpus = texts.build(Path(__file__).parent / "corpus", size, options.seed)
    shown = [t.text for t in [*corpus.protected, *corpus.neighbours] for _ in range(REPEATS[t.kind])]
    planted = texts.encode(tokenizer, shown)
    ordinary = texts.encode(tokenizer, corpus.ordinary)
    config = configuration(options.family, size)
    started = time.monotonic()
    model = train(config, ordinary, planted, schedule_for(size, options), options.compile)
    seconds = time.monotonic() - started
    options.out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, tokenizer, options.out / "checkpoint")
    save_corpus(corpus, first_documents(corpus.ordinary, size.statistics_characters), options.out)
    table = results(options.out, corpus, size.byte_limit, seconds)
    print(table)
    if options.report:
        options.report.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
