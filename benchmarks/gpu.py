"""Speed of scan and fix on a GPU, on random weights in the shapes of well-known models; prints and writes JSON.

    python benchmarks/gpu.py --out gpu.json                     # SmolLM-360M, OLMo-7B and Llama-2-7B shapes, on CUDA
    python benchmarks/gpu.py --shape smollm-360m --edits 10 100 --out gpu.json
    python benchmarks/gpu.py --shape tiny --device cpu --out tiny.json      # what the tests run: seconds, any machine

Speed needs no trained weights. Times are CUDA events around a section that is synchronised only at its ends; on the
CPU they are the clock's. The share of the peak is of this card's own peak, measured in the same run with large square
matrix multiplications. Texts to edit are greedy continuations of random tokens: the model gives them away by
construction. The file is rewritten after every section, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_shapes import (
    SHAPES,
    Shape,
    as_inputs,
    as_loaded,
    as_texts,
    forward_flops,
    given_away,
    matmul_parameters,
    random_rows,
)

from memscrub.edit.disturbance import measure_disturbance
from memscrub.errors import IncompleteError
from memscrub.jobs.editing import make_edit, statistics_rows
from memscrub.jobs.joint_editing import usual_layers
from memscrub.locality.distance import RetainHalves
from memscrub.measures.extraction import Sampling, scored
from memscrub.measures.passes import out_of_memory
from memscrub.models.model import LoadedModel, choose_device
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import TokenText, batches, pad

ROW = 256
WARM_UP = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How much of everything; `--shape tiny` has its own, small ones."""

    texts: int = 4096
    length: int = 100
    edits: tuple[int, ...] = (10, 100, 1000)
    retain_tokens: int = 65536
    batch_tokens: int = 8192
    repeats: int = 5
    matmul: tuple[int, ...] = (4096, 8192, 16384)


TINY = Settings(texts=12, length=40, edits=(1, 2), retain_tokens=2048, batch_tokens=256, repeats=2, matmul=(128, 256))


@dataclass(frozen=True)
class Device:
    """Where things run, and how time and memory are measured there."""

    place: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds of the work, all of it, and its result."""
        if not self.is_cuda:
            began = time.perf_counter()
            result = work()
            return time.perf_counter() - began, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # else the first event waits behind what was launched before
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result

    def forget_peak(self) -> None:
        """Let the next `peak_bytes` be that of what follows."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most memory allocated on the card since `forget_peak`; on the CPU, the most that the process ever held."""
        if self.is_cuda:
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def machine(self) -> dict[str, Any]:
        """What the figures were measured on."""
        found: dict[str, Any] = {
            "device": str(self.place),
            "gpu": None,
            "gpu_memory_bytes": None,
            "driver": None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.place)
            found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "driver": driver()}
        return found


def main() -> None:
    """Measure every shape and write what was found after each section."""
    options = _options()
    device = Device(choose_device(options.device))
    if device.place.index is not None:
        torch.cuda.set_device(device.place)
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    names = options.shape or ["smollm-360m", "olmo-7b", "llama-2-7b"]
    settings = _settings(options, names)
    found: dict[str, Any] = {"machine": device.machine(), "dtype": _name(dtype), "shapes": []}
    print(json.dumps(found["machine"], indent=1), flush=True)
    if not device.is_cuda:
        print("not a GPU: these figures say nothing about one", flush=True)
    found["matmul"] = matmul_peak(device, dtype, settings)
    for name in names:
        part: dict[str, Any] = {"shape": name, "source": SHAPES[name].source}
        found["shapes"].append(part)
        for title, figures in sections(SHAPES[name], device, dtype, settings, found["matmul"]["flops_per_second"]):
            part[title] = figures
            print(f"{name} {title}: {json.dumps(figures)}", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--edits", type=int, nargs="*", help="numbers of texts to edit; none: no fix")
    parser.add_argument("--retain-tokens", type=int)
    parser.add_argument("--batch-tokens", type=int)
    return parser.parse_args()


def _settings(options: argparse.Namespace, names: Sequence[str]) -> Settings:
    usual = TINY if set(names) == {"tiny"} else Settings()
    return replace(
        usual,
        texts=options.texts or usual.texts,
        edits=usual.edits if options.edits is None else tuple(options.edits),
        retain_tokens=options.retain_tokens or usual.retain_tokens,
        batch_tokens=options.batch_tokens or usual.batch_tokens,
    )


def sections(
    shape: Shape, device: Device, dtype: torch.dtype, settings: Settings, peak: float
) -> Iterable[tuple[str, Any]]:
    """Every figure of one shape, section by section."""
    model = shape.build(device.place, dtype)
    blocks, head = matmul_parameters(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield "model", {"parameters": parameters, "block_matmul_parameters": blocks, "head_parameters": head}
    loaded = as_loaded(model, shape, device.place, dtype)
    yield "scan", scan(loaded, shape, device, settings, peak)
    # `fix` computes in float32, whatever the checkpoint is stored in.
    loaded = as_loaded(model.float(), shape, device.place, torch.float32)
    rows = random_rows(shape, settings.retain_tokens // ROW, ROW, seed=1)
    yield "statistics", retain_statistics(loaded, rows, device)
    if settings.edits:
        texts = given_away(loaded, shape, max(settings.edits), settings.length)
        fixes: list[dict[str, Any]] = []
        for count in settings.edits:
            fixes.append(fix(loaded, shape, texts[:count], rows, device))
            yield "fix", fixes
            if fixes[-1]["seconds"] is None:  # more texts would fail too
                break


def matmul_peak(device: Device, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    """The most operations a second that square matrix multiplications reach here, over some sizes."""
    by_size = {}
    for size in settings.matmul:
        a, b = (torch.randn(size, size, device=device.place, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        count = 20 if device.is_cuda else 3

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out, count: int = count) -> None:
            for _ in range(count):
                torch.matmul(a, b, out=out)

        device.timed(multiply)
        seconds = min(device.timed(multiply)[0] for _ in range(settings.repeats))
        by_size[str(size)] = 2 * size**3 * count / seconds
    return {"dtype": _name(dtype), "flops_per_second": max(by_size.values()), "by_size": by_size}


def scan(loaded: LoadedModel, shape: Shape, device: Device, settings: Settings, peak: float) -> dict[str, Any]:
    """The teacher-forced pass of `scan`, beside the bare forward pass over the same tokens."""
    texts = as_texts(random_rows(shape, settings.texts, settings.length, seed=0).tolist())
    flops = forward_flops(loaded.model, shape, settings.length) * len(texts)
    tokens = len(texts) * settings.length

    def run() -> None:
        for _ in scored(loaded, texts, lambda _: Sampling(), batch_tokens=settings.batch_tokens):
            pass

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches([settings.length] * len(texts), settings.batch_tokens):
                ids = pad([texts[i].tokens for i in batch]).to(device.place)
                loaded.model(input_ids=ids, use_cache=False)

    bare_peak, bare_seconds = _repeated(bare, device, settings.repeats)
    scan_peak, seconds = _repeated(run, device, settings.repeats)
    median, bare_median = statistics.median(seconds), statistics.median(bare_seconds)
    return {
        "texts": len(texts),
        "tokens": tokens,
        "batch_tokens": settings.batch_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / median,
        "flops_per_token": flops / tokens,
        "flops_per_second": flops / median,
        "share_of_matmul_peak": flops / median / peak,
        "bare_forward_seconds": bare_seconds,
        "bare_forward_tokens_per_second": tokens / bare_median,
        "scan_over_bare_forward": median / bare_median,
        "peak_memory_bytes": scan_peak,
        "bare_forward_peak_memory_bytes": bare_peak,
    }


def _repeated(work: Callable[[], None], device: Device, repeats: int) -> tuple[int, list[float]]:
    """Peak memory, and seconds of each repeat after the warm-up."""
    for _ in range(WARM_UP):
        work()
    device.forget_peak()
    seconds = [device.timed(work)[0] for _ in range(repeats)]
    return device.peak_bytes(), seconds


def retain_statistics(loaded: LoadedModel, rows: Tensor, device: Device) -> dict[str, Any]:
    """Both metrics of every site that `fix` edits by default, from the rows and their beginnings, as `fix` has them."""
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"), layers=usual_layers(loaded))
    parts = statistics_rows(loaded, rows)
    measure_disturbance(loaded, sites[:1], [rows[:1]], seed=0)
    device.forget_peak()
    seconds, _ = device.timed(lambda: measure_disturbance(loaded, sites, parts, seed=0))
    tokens = sum(part.numel() for part in parts)
    return {
        "dtype": _name(loaded.dtype),
        "sites": len(sites),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": device.peak_bytes(),
    }


def fix(
    loaded: LoadedModel, shape: Shape, texts: tuple[TokenText, ...], rows: Tensor, device: Device
) -> dict[str, Any]:
    """One edit of so many texts, from the retain statistics on, and taken back. No seconds where memory is short."""
    inputs = as_inputs(loaded, shape, texts)
    halves = RetainHalves(solver=rows, judge=rows[:0], dropped=0, statistics=rows[:0])
    device.forget_peak()
    about = {"texts": len(texts), "distinct_tokens": statistics.mean(len(set(text.tokens)) for text in texts)}
    try:
        seconds, edit = device.timed(lambda: make_edit(inputs, halves))
    except (RuntimeError, IncompleteError) as error:
        if not isinstance(error, IncompleteError) and not out_of_memory(error):
            raise
        return {**about, "seconds": None, "failed": type(error).__name__, "peak_memory_bytes": device.peak_bytes()}
    found = {
        **about,
        "seconds": seconds,
        "seconds_include": "retain statistics, rehearsal, rounds, refinements",
        "unmet": len(edit.made.outcome.unmet),
        "no_room": len(edit.made.no_room),
        "break_points": edit.made.outcome.break_points,
        "rounds": edit.made.rounds,
        "stages": list(edit.made.stages),
        "edited_tensors": len(edit.tensors()),
        "peak_memory_bytes": device.peak_bytes(),
    }
    edit.editable.restore()
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver, where its tool is there to tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
