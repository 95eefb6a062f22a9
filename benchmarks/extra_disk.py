"""The extra disk that a fix's retain statistics take, by calculation, for models of known shapes.

    python benchmarks/extra_disk.py                                    # a table, in seconds, without any weights
    python benchmarks/extra_disk.py --time                             # what it costs to keep few inputs on disk
    python benchmarks/extra_disk.py --measure CHECKPOINT POLICY FOLDER # measure them in a new folder, as a fix does

The sweep is followed with memscrub's own plan of it (`memscrub.edit.portions`), as `block_statistics` goes through it.
`large_checkpoint.py --parts statistics` watches the last command.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import large_checkpoint
from gpu_shapes import SHAPES, Shape, as_loaded

from memscrub.edit.block_statistics import measure_by_block
from memscrub.edit.disturbance import graded
from memscrub.edit.portions import Reading, every_input, few_inputs, portions, reading_of, statistics_size
from memscrub.jobs.editing import START, statistics_rows
from memscrub.jobs.ordinary_text import retain_halves
from memscrub.jobs.scanning import open_inputs
from memscrub.models.lean_weights import LARGE
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import open_checkpoint

KINDS = {"mlp": "mlp", "attention": "attention", "queries": "query"}
SITES = ("mlp", "mlp+attention", "mlp+attention+queries")
ROWS = {"short": 8, "long": 781}  # of 256 tokens in the solver's half; 200000 tokens are the default's most
MODELS = (
    Shape("benchmark-4gb", "large_checkpoint.py --size 4e9", "llama",
          32000, 2048, 5632, 36, 32, 32, 512, False, 1_980_909_568),
    SHAPES["smollm-360m"],
    SHAPES["olmo-7b"],
    SHAPES["llama-2-7b"],
    Shape("llama-3-8b", "meta-llama/Meta-Llama-3-8B", "llama",
          128256, 4096, 14336, 32, 32, 8, 8192, False, 8_030_261_248),
)  # fmt: skip


def main() -> None:
    """The table, or one measurement."""
    if sys.argv[1:2] == ["--time"]:
        compare()
        return
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    print("GB in bfloat16; the goal is the touched shards: between the blocks' weights and all weights")
    print(
        f"{'model':14}{'weights':>8}{'blocks':>8}  {'sites':22}{'statistics':>10}{'short':>8}{'long':>8}  portions of"
    )
    for shape in MODELS:
        _rows_of(shape)


def _rows_of(shape: Shape) -> None:
    nowhere = torch.device("meta")
    loaded = as_loaded(shape.build(nowhere, torch.bfloat16), shape, nowhere, torch.float32)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    blocks = sum(each.nbytes for each in loaded.model.get_submodule(loaded.family.blocks).parameters())
    for names in SITES:
        sites = of_kinds(loaded, names)
        said = f"{shape.name:14}{weights / 1e9:8.2f}{blocks / 1e9:8.2f}  {names:22}"
        if weights < LARGE:
            print(f"{said}none: it is loaded as float32, with its statistics in memory")
            continue
        peaks = []
        for count in ROWS.values():
            rows = [torch.empty(count, width, device=nowhere) for width in (256, START + 1)]
            peaks.append(f"{peak(loaded, sites, rows) / 1e9:8.2f}")
        reading = reading_of(loaded, sites, sum(part.numel() for part in rows))
        print(f"{said}{statistics_size(loaded, sites) / 1e9:10.2f}{''.join(peaks)}  {reading.tokens} tokens, at most"
              f" {reading.kept} of {shape.layers} inputs")  # fmt: skip


def of_kinds(loaded: LoadedModel, names: str) -> list[Site]:
    """The sites that `[fix] sites` names."""
    return list(sites_of(loaded, kinds=[KINDS[name] for name in names.split("+")]))


def peak(loaded: LoadedModel, sites: Sequence[Site], rows: Sequence[Tensor], *, batch_tokens: int = 2048) -> int:
    """Bytes on disk at the peak, of inputs, gradients and statistics, for text `[rows, width]` each."""
    lowest = min(site.layer for site in sites)
    layers = range(lowest, len(list(loaded.model.get_submodule(loaded.family.blocks).children())))
    sizes = [statistics_size(loaded, [site for site in sites if site.layer == layer]) for layer in layers]
    pairs = list(graded(loaded, sites, rows, batch_tokens))
    with_gradients = {id(ids) for ids, wanted in pairs if wanted}
    reading = reading_of(loaded, sites, sum(ids.numel() for ids, _ in pairs))
    width = loaded.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    most = stored = 0
    for part in portions((ids for ids, _ in pairs), reading.tokens):
        each, begun = 4 * width * sum(ids.numel() for ids in part), stored > 0
        gradients = 4 * width * sum(ids.numel() for ids in part if id(ids) in with_gradients)
        for number in reversed(range(len(layers))):
            inputs = on_disk(reading, number)
            most = max(most, stored + each * inputs + gradients)
            stored += 0 if begun else sizes[number]
            most = max(most, stored + each * (inputs - 1) + (gradients if number else 0))
    return most


def on_disk(reading: Reading, number: int) -> int:
    """How many blocks' inputs lie on disk when this one is differentiated."""
    below = [segment for segment in reading.segments if segment[0] <= number]
    return len(below) + number - below[-1][0]


def compare() -> None:
    """Processor time of both ways to read the same portions, in turn: every input on disk, or few of them."""
    with tempfile.TemporaryDirectory() as folder:
        large_checkpoint.make(Path(folder) / "checkpoint", large_checkpoint.Shape.of(160e6))
        loaded = load_model(open_checkpoint(Path(folder) / "checkpoint"), device="cpu", lean=True)
        sites = of_kinds(loaded, SITES[-1])
        blocks = len({site.layer for site in sites})
        rows = [torch.randint(loaded.vocabulary, (4, 256), generator=torch.Generator().manual_seed(0))]
        ratios = []
        for number in range(3):
            seconds = []
            for segments in (every_input(blocks), few_inputs(blocks)):
                began, place = time.process_time(), Path(folder) / f"{number}-{len(seconds)}"
                measure_by_block(loaded, sites, rows, place, seed=0, reading=Reading(512, segments))
                seconds.append(time.process_time() - began)
                shutil.rmtree(place)
            ratios.append(seconds[1] / seconds[0])
            print(f"{blocks} blocks, every input: {seconds[0]:.1f} s, few: {seconds[1]:.1f} s (x {ratios[-1]:.2f})")
        print(f"few inputs: x {sorted(ratios)[1]:.2f} of the processor time (median of 3)")


def measure(checkpoint: str, policy: str, folder: str) -> None:
    """The retain statistics of a checkpoint by a policy, in a new folder; says what they should take of the disk."""
    inputs = open_inputs(checkpoint, policy, device="cpu")
    halves = retain_halves(inputs)
    rows = statistics_rows(inputs.loaded, torch.cat([halves.solver, halves.statistics]))
    sites = of_kinds(inputs.loaded, inputs.policy.fix.sites)
    count = sum(part.numel() for part in rows)
    reading = reading_of(inputs.loaded, sites, count)
    print(f"statistics of {count} tokens in portions of {reading.tokens}, at most {reading.kept} inputs on disk;"
          f" extra disk by calculation {peak(inputs.loaded, sites, rows) / 1e9:.3f} GB", flush=True)  # fmt: skip
    measure_by_block(inputs.loaded, sites, rows, Path(folder), seed=0)


if __name__ == "__main__":
    main()
