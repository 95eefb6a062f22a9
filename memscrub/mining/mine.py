"""Mining: which texts of a training corpus does a checkpoint give away? Reads the corpus in windows, goes on from where
an interrupted run stood, and writes what it finds as a protected list; knows no policy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from memscrub.errors import OutputError, UsageError
from memscrub.measures.measure import Progress, silent
from memscrub.mining.entries import Entry, Sifted, entries, list_files, sift, sources_file, write_files
from memscrub.mining.journal import COUNTS, Journal
from memscrub.mining.reading import Reading, found_in, longest_runs, lots_of
from memscrub.mining.windows import Windows
from memscrub.models.merging import load_merged
from memscrub.models.model import LoadedModel
from memscrub.reports.report import CheckpointRecord
from memscrub.storage.adapters import open_adapter
from memscrub.storage.checkpoint import digest_files, open_checkpoint
from memscrub.storage.files import tree_digest
from memscrub.texts.corpora import CorpusFile, FileEnd, find_files


@dataclass(frozen=True)
class Settings:
    """How a corpus is mined. `run`: more tokens running that greedy decoding emits are a finding; 16 is the limit of
    the shipped policies. `context`: tokens of true text before the run in an entry. `window`, `overlap` and
    `openings` say how documents are read, `similar` from what similarity on texts count as copies of one another.
    """

    run: int = 16
    window: int = 512
    overlap: int = 64
    context: int = 32
    openings: str = "paragraphs"
    similar: float = 0.9
    class_name: str = "copyright"
    text_column: str = "text"
    batch_tokens: int = 8192

    def windows(self, loaded: LoadedModel) -> Windows:
        """The windows for a model, no longer than it reads. Raises UsageError where that is too short."""
        size = min(self.window, loaded.max_positions - len(loaded.prompt))
        return Windows(size, self.overlap, self.run, self.context, self.openings)


@dataclass(frozen=True)
class Funnel:
    """How many are left behind each step; `tokens` are those of the corpus, `fed` those the model read."""

    documents: int
    tokens: int
    windows: int
    fed: int
    candidates: int
    merged: int
    telling: int
    unguessed: int
    kept: int


@dataclass(frozen=True)
class Mined:
    """What came of a run: the entries, the list's file (None without any), and what could not be read, in sentences.

    `problems` make the run incomplete, `remarks` do not. `guessed`: stretches that come out of control texts, which
    the model cannot have memorized; None without controls. `input` and `adapter` are what was mined, as in the report
    of a scan; None where a loaded model was given.
    """

    funnel: Funnel
    entries: tuple[Entry, ...]
    out: Path | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    guessed: int | None
    input: CheckpointRecord | None = None
    adapter: CheckpointRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without any text."""
        return {
            "funnel": asdict(self.funnel),
            "out": None if self.out is None else str(self.out),
            "sources": None if self.out is None else str(sources_file(self.out)),
            "input": None if self.input is None else asdict(self.input),
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "guessed_in_controls": self.guessed,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "texts": [entry.source_line() for entry in self.entries],
        }


def mine(
    checkpoint: str | Path,
    corpus: Sequence[Path],
    out: Path,
    *,
    settings: Settings = Settings(),
    controls: Sequence[Path] = (),
    adapter: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    remark: Callable[[str], None] = lambda sentence: None,
) -> Mined:
    """Find what `checkpoint` gives away of the files of `corpus` and write it to `out` as a protected list.

    `adapter` is a LoRA adapter of the checkpoint, added to it in memory; `remark` is told so. What came of the corpus
    so far is in `OUT.journal`, from which the same call goes on. No file that is read is ever written, with `overwrite`
    neither. Raises UsageError (and its kinds) for unusable input, IncompleteError when the run cannot end.
    """
    _check_out(out)
    guessable = find_files(controls)
    files = (*guessable, *find_files(corpus))
    _refuse_inputs(out, files)
    number = len(guessable)
    added = None if adapter is None else open_adapter(adapter)
    ckpt = open_checkpoint(checkpoint)
    _refuse_inside(out, [ckpt.path] if added is None else [ckpt.path, added.path])
    loaded = load_merged(ckpt, added, device=device, dtype=dtype, remark=remark)
    settings.windows(loaded)
    source = _record(str(checkpoint), digest_files(ckpt))
    more = None if added is None else _record(added.source, digest_files(added.path))
    key = {
        "version": version("memscrub"),
        "checkpoint": source.sha256,
        "adapter": "" if more is None else more.sha256,
        "options": asdict(settings),
        "corpus": [[os.fsdecode(file.path), file.size, file.changed] for file in files[number:]],
        "controls": [[os.fsdecode(file.path), file.size, file.changed] for file in files[:number]],
        "arithmetic": [str(loaded.dtype), loaded.device.type, torch.__version__],
    }
    mined = mine_loaded(loaded, files, number, out, key, settings=settings, overwrite=overwrite, progress=progress)
    return replace(mined, input=source, adapter=more)


def mine_loaded(
    loaded: LoadedModel,
    files: Sequence[CorpusFile],
    controls: int,
    out: Path,
    key: Mapping[str, Any],
    *,
    settings: Settings,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Mined:
    """`mine` on a model that is loaded and files that were looked up, the first `controls` of them control texts."""
    windows = settings.windows(loaded)
    _refuse_inputs(out, files)
    with Journal(journal_file(out), key) as journal:
        if not overwrite:
            _refuse_existing(out, journal)
        reading = Reading(loaded, windows, settings.text_column, settings.batch_tokens)
        _read_corpus(reading, files, controls, journal, progress)
        sifted = sift([stretch for lot in journal.lots for stretch in lot.found], controls, settings.similar)
        made = entries(
            sifted,
            files,
            lambda forms: longest_runs(loaded, forms, settings.batch_tokens),
            class_name=settings.class_name,
            limit=settings.run,
        )
        if made:
            contents = list_files(out, made)
            if not overwrite:  # reading takes long, and others write files too
                _refuse_existing(out, journal)
            journal.announce(contents.values())
            write_files(contents)
        funnel, ends = _funnel(journal, controls, sifted, len(made))
        problems, remarks = _complaints(files, ends)
        journal.remove()
    guessed = sifted.guessed if controls else None
    return Mined(funnel, made, out if made else None, problems, remarks, guessed)


def journal_file(out: Path) -> Path:
    """Where a run that is to write `out` keeps what it has found so far."""
    return out.with_name(out.name + ".journal")


def _check_out(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise UsageError(f"{out}: the list is written as JSON lines; give --out a name that ends in .jsonl.")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out}: the list cannot be written there; name a file in a folder that exists.")


def _record(source: str, files: dict[str, str]) -> CheckpointRecord:
    return CheckpointRecord(source, tree_digest(files), files)


def _refuse_inside(out: Path, folders: Sequence[Path]) -> None:
    """Raise OutputError where the list would lie in a directory that is read: nothing is ever written there."""
    for folder in folders:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise OutputError(f"{out} lies in {folder}, which is never written; choose another --out.")


def _refuse_inputs(out: Path, files: Sequence[CorpusFile]) -> None:
    """Raise OutputError where a file that is to be written is one of those that are read, by whatever links."""
    inputs = {_identity(file.path) for file in files} - {None}
    for path in (out, sources_file(out), journal_file(out)):
        if _identity(path) in inputs:
            raise OutputError(f"{path} is a file of the corpus or the controls; choose another --out.")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _refuse_existing(out: Path, journal: Journal) -> None:
    """Raise OutputError where a file that is to be written exists, unless this run, once interrupted, wrote it."""
    for path in (out, sources_file(out)):
        if os.path.lexists(path) and not journal.wrote(path):
            raise OutputError(f"{path} exists already; choose another --out, or give --overwrite.")


def _read_corpus(
    reading: Reading, files: Sequence[CorpusFile], controls: int, journal: Journal, progress: Progress
) -> None:
    """Read what the journal does not have yet into it; a thread reads and tokenizes one lot ahead of the model."""
    start = (journal.lots[-1].file, journal.lots[-1].pieces) if journal.lots else (0, 0)
    total = max(1, sum(file.size for file in files) // 1024)
    lots = lots_of(reading, files, controls, start)
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, lots, None)
        while (lot := coming.result()) is not None:
            coming = pool.submit(next, lots, None)
            journal.add(found_in(reading, lot))
            progress("corpus (KiB)", min(lot.read // 1024, total), total)
    progress("corpus (KiB)", total, total)


def _funnel(journal: Journal, controls: int, sifted: Sifted, kept: int) -> tuple[Funnel, Mapping[int, FileEnd]]:
    """The funnel of the corpus proper, and how every file ended, that of the controls too."""
    ends = {file: end for lot in journal.lots for file, end in lot.ends.items()}
    total = {name: sum(lot.counts[name] for lot in journal.lots if not lot.controls) for name in COUNTS}
    funnel = Funnel(
        documents=sum(end.documents for file, end in ends.items() if file >= controls),
        tokens=total["tokens"],
        windows=total["windows"],
        fed=total["fed"],
        candidates=total["candidates"],
        merged=total["merged"] - sifted.merged_away,
        telling=sifted.telling,
        unguessed=sifted.telling - sifted.in_controls,
        kept=kept,
    )
    return funnel, ends


def _complaints(files: Sequence[CorpusFile], ends: Mapping[int, FileEnd]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files that could not be read to their end, and what was passed over in others; one sentence for each file."""
    problems, remarks = [], []
    for number in sorted(ends):
        file, end = files[number], ends[number]
        row = "row" if file.format == ".parquet" else "line"
        if end.error is not None:
            problems.append(f"{file.path}: {end.error}; what was read before that counts.")
        passed = []
        if end.bad:
            first = ", ".join(map(str, end.first_bad)) + (", ..." if end.bad > len(end.first_bad) else "")
            passed.append(f"{end.bad} unreadable {row}{'s' * (end.bad > 1)} skipped ({first})")
        if end.replaced:
            passed.append(f"{end.replaced} bytes or characters that are no text replaced")
        if end.empty:
            passed.append(f"{end.empty} empty document{'s' * (end.empty > 1)}")
        if passed:
            remarks.append(f"{file.path}: {', '.join(passed)}.")
    return tuple(problems), tuple(remarks)
