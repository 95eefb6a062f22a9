"""benchmarks/gpu.py: runs as it would on a GPU, only small and on the CPU, and its figures fit together."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memscrub.measures.extraction import Sampling, score

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--shape", "tiny", "--device", "cpu", "--out", str(out)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(out.read_text(encoding="utf-8")), ended.stdout


@pytest.fixture(scope="module")
def modules() -> tuple[Any, Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu"), importlib.import_module("gpu_shapes")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_machine_is_named_and_a_cpu_is_not_taken_for_a_gpu(ran: tuple[dict[str, Any], str]) -> None:
    found, shown = ran
    machine = found["machine"]
    assert set(machine) >= {"device", "gpu", "driver", "cuda", "torch", "python", "platform", "gpu_memory_bytes"}
    assert (machine["device"], machine["gpu"], machine["torch"]) == ("cpu", None, torch.__version__)
    assert "not a GPU" in shown


def test_the_figures_of_the_scan_fit_together(ran: tuple[dict[str, Any], str]) -> None:
    found, _ = ran
    (shape,) = found["shapes"]
    scan, peak = shape["scan"], found["matmul"]
    assert peak["flops_per_second"] == max(peak["by_size"].values()) > 0
    seconds, bare = statistics.median(scan["seconds"]), statistics.median(scan["bare_forward_seconds"])
    assert min(*scan["seconds"], *scan["bare_forward_seconds"]) > 0
    assert scan["tokens"] == scan["texts"] * 40
    assert scan["tokens_per_second"] == pytest.approx(scan["tokens"] / seconds)
    assert scan["bare_forward_tokens_per_second"] == pytest.approx(scan["tokens"] / bare)
    assert scan["scan_over_bare_forward"] == pytest.approx(seconds / bare)
    assert scan["flops_per_second"] == pytest.approx(scan["flops_per_token"] * scan["tokens_per_second"])
    assert scan["share_of_matmul_peak"] == pytest.approx(scan["flops_per_second"] / peak["flops_per_second"])
    per_token = 2 * (shape["model"]["block_matmul_parameters"] + shape["model"]["head_parameters"])
    assert 0.9 * per_token < scan["flops_per_token"] < 1.2 * per_token
    assert scan["peak_memory_bytes"] >= 4 * shape["model"]["parameters"]


def test_statistics_and_edits_are_timed_and_the_edits_are_real(ran: tuple[dict[str, Any], str]) -> None:
    (shape,) = ran[0]["shapes"]
    taken = shape["statistics"]
    assert taken["sites"] == 6  # two layers: MLP and attention outputs, queries
    assert taken["tokens"] == 2048 + 2048 // 256 * 64
    assert taken["tokens_per_second"] == pytest.approx(taken["tokens"] / taken["seconds"])
    assert [each["texts"] for each in shape["fix"]] == [1, 2]
    for each in shape["fix"]:
        assert each["seconds"] > 0 and each["peak_memory_bytes"] > 0
        assert each["unmet"] == 0
        assert each["break_points"] >= each["texts"]  # each text ran on for longer than the policy allows
        assert each["edited_tensors"] > 0


def test_the_shapes_have_the_published_number_of_parameters(modules: tuple[Any, Any]) -> None:
    for shape in modules[1].SHAPES.values():
        model = shape.build(torch.device("meta"), torch.bfloat16)
        assert sum(value.numel() for value in model.parameters()) == shape.parameters, shape.name
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_the_formula_counts_what_torch_counts(modules: tuple[Any, Any]) -> None:
    shape = modules[1].SHAPES["tiny"]
    model, length = shape.build(torch.device("cpu"), torch.float32), 30
    model.set_attn_implementation("eager")  # torch does not count the fused kernel on the CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # torch also counts pairs of a token and a later one, and the last token's logits, which predict nothing known.
    pairs = 4 * shape.width * shape.layers * (length**2 - length * (length + 1) // 2)
    last = 2 * shape.vocabulary * shape.width
    assert modules[1].forward_flops(model, shape, length) == counter.get_total_flops() - pairs - last


def test_texts_to_edit_are_given_away_by_the_model(modules: tuple[Any, Any]) -> None:
    shapes = modules[1]
    shape = shapes.SHAPES["tiny"]
    model = shape.build(torch.device("cpu"), torch.float32)
    loaded = shapes.as_loaded(model, shape, torch.device("cpu"), torch.float32)
    texts = shapes.given_away(loaded, shape, 5, 40)
    for text, scores in zip(texts, score(loaded, texts, lambda _: Sampling()), strict=True):
        assert len(text.tokens) == 40
        assert bool((scores.gap[shapes.GIVEN - 1 :] > -1e-3).all())
    assert len({text.tokens for text in texts}) == 5


def test_on_cuda_a_section_lies_between_two_events_and_is_waited_for_only_at_its_ends(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self and said[-1] == "wait"
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))

    def work() -> str:
        said.append("work")
        return "done"

    assert modules[0].Device(torch.device("cuda")).timed(work) == (2.5, "done")
    assert said == ["wait", "record", "work", "record", "wait"]
