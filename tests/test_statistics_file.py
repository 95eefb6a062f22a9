"""The statistics file: what was kept is what was measured, and a file of anything else is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import opened, ordinary_rows, tiny_checkpoint

from memscrub.edit.disturbance import RIDGE, Metric, measure_disturbance
from memscrub.edit.statistics_file import (
    FORMAT,
    check_place,
    load_metrics,
    metrics_from,
    save_metrics,
    site_name,
    statistics_key,
)
from memscrub.errors import IncompleteError, OutputError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import digest_files, open_checkpoint

ROWS = ordinary_rows(1, rows=6, width=24)
KEY = {"checkpoint": "0" * 64, "retain text": "1" * 64, "seed": "0", "ridge": "0.01"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("statistics"), "llama", seed=3)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return opened(folder)


def metric(seed: int, f: int = 6, d: int = 4) -> Metric:
    generator = torch.Generator().manual_seed(seed)
    return Metric(torch.randn(f, f, generator=generator).tril(), torch.randn(d, d, generator=generator).tril())


def same(one: Sequence[Metric], other: Sequence[Metric]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.outputs, b.outputs) for a, b in pairs)


def never() -> list[Metric]:
    raise AssertionError("measured again")


def test_the_second_run_reads_what_the_first_one_measured(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    sites = sites_of(loaded)
    key = statistics_key(loaded, digest_files(open_checkpoint(folder)), [ROWS], seed=0, ridge=RIDGE)
    path = tmp_path / "stats.safetensors"
    measured = metrics_from(path, key, lambda: measure_disturbance(loaded, sites, [ROWS], seed=0), sites)
    assert same(metrics_from(path, key, never, sites), measured)
    assert os.listdir(tmp_path) == ["stats.safetensors"]
    floats = sum(m.inputs.numel() + m.outputs.numel() for m in measured)
    assert 4 * floats < path.stat().st_size < 4 * floats + 10_000


def test_other_sites_join_the_same_file(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    mlp, attention = sites_of(loaded, kinds=("mlp",)), sites_of(loaded, kinds=("attention",))
    first, second = [metric(i) for i in range(len(mlp))], [metric(9 + i) for i in range(len(attention))]
    metrics_from(path, KEY, lambda: first, mlp)
    metrics_from(path, KEY, lambda: second, attention)
    assert same(metrics_from(path, KEY, never, [*attention, *mlp]), [*second, *first])


def test_sites_that_differ_in_columns_or_rows_only_are_told_apart(loaded: LoadedModel) -> None:
    from dataclasses import replace

    site: Site = sites_of(loaded)[0]
    parts = [site, replace(site, columns=(0, 1)), replace(site, columns=(1, 2)), replace(site, rows=(0, 1))]
    assert len({site_name(part) for part in parts}) == 4


def test_without_a_file_the_metrics_are_only_computed() -> None:
    found = [metric(1)]
    assert metrics_from(None, KEY, lambda: found, []) is found


@pytest.mark.parametrize("name", sorted(KEY))
def test_another_input_is_refused_by_its_name_and_the_file_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_metrics(path, KEY, {"a": metric(1)})
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"made with another {name}") as caught:
        load_metrics(path, {**KEY, name: "7"})
    assert "stats.safetensors" in str(caught.value) and "--stats" in str(caught.value)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="made with another dtype"):
        load_metrics(path, {**KEY, "dtype": "float32"})
    with pytest.raises(UsageError, match=f"made with another {name}"):
        load_metrics(path, {key: value for key, value in KEY.items() if key != name})


def test_short_values_are_shown_and_digests_are_not(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_metrics(path, KEY, {"a": metric(1)})
    with pytest.raises(UsageError, match=r"another seed \(0 there, 5 here\)"):
        load_metrics(path, {**KEY, "seed": "5"})
    with pytest.raises(UsageError) as caught:
        load_metrics(path, {**KEY, "checkpoint": "2" * 64})
    assert "000" not in str(caught.value) and "222" not in str(caught.value)


def test_the_key_changes_with_every_input(loaded: LoadedModel) -> None:
    def key(**other: object) -> dict[str, str]:
        given = {"checkpoint": {"a": "1"}, "retain": [ROWS], "seed": 0, "ridge": 0.01, **other}
        return statistics_key(loaded, **given)  # type: ignore[arg-type]

    first = key()
    flipped = ROWS.clone()
    flipped[3, 7] += 1
    for changed, name in (
        ({"checkpoint": {"a": "2"}}, "checkpoint"),
        ({"retain": [flipped]}, "retain text"),
        ({"retain": [ROWS.view(12, 12)]}, "retain text"),
        ({"retain": [ROWS[:3], ROWS[3:]]}, "retain text"),
        ({"seed": 1}, "seed"),
        ({"ridge": 0.1}, "ridge"),
    ):
        assert {part for part in first if key(**changed)[part] != first[part]} == {name}
    assert {"dtype", "device"} <= set(first)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"{}",
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: data.replace(b"a.inputs", b"b.inputs"),
        lambda data: data.replace(b"memscrub_statistics", b"memscrub_statistica"),
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" * (len(data) - 8),
    ],
)
def test_a_damaged_file_is_one_clear_sentence(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_metrics(path, KEY, {"a": metric(1)})
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UsageError, match="no statistics file of memscrub, or it is damaged"):
        load_metrics(path, KEY)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_metrics(path, KEY, {"a": metric(1)})
    path.write_bytes(
        path.read_bytes().replace(f'"memscrub_statistics":"{FORMAT}"'.encode(), b'"memscrub_statistics":"0"')
    )
    with pytest.raises(UsageError, match="format"):
        load_metrics(path, KEY)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.safetensors"
    save_metrics(path, KEY, {"a": metric(1)})

    def full(_from: Path, _to: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(IncompleteError, match="No space is left"):
        save_metrics(path, KEY, {"a": metric(2)})
    assert os.listdir(tmp_path) == ["stats.safetensors"]
    assert same([load_metrics(path, KEY)["a"]], [metric(1)])


def test_a_place_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    check_place(tmp_path / "stats", outside=[tmp_path / "input"])
    with pytest.raises(UsageError, match="folder that exists"):
        check_place(tmp_path / "missing" / "stats", outside=[])
    with pytest.raises(UsageError, match="folder that exists"):
        check_place(tmp_path, outside=[])
    (tmp_path / "input").mkdir()
    with pytest.raises(OutputError, match="another folder"):
        check_place(tmp_path / "input" / "stats", outside=[tmp_path / "input"])
