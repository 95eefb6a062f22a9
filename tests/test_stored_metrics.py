"""Metrics in files are the metrics, bit for bit, in half of the room."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memscrub.edit.disturbance import Metric
from memscrub.edit.stored_metrics import StoredTriangle, store, store_triangle
from memscrub.errors import IncompleteError

MATRICES = st.integers(1, 40).flatmap(
    lambda size: arrays.arrays(np.uint32, (2, size, size), elements=st.integers(0, 2**32 - 1))
)


@given(MATRICES)
def test_a_lower_triangle_is_read_back_bit_for_bit_from_half_of_the_room(bits: np.ndarray) -> None:
    size = len(bits[0])
    expected = [torch.from_numpy(np.tril(each).view(np.float32)) for each in bits]  # every NaN and -0.0 too
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "triangle"
        for matrix in expected:  # the second takes the place of the first
            stored = store_triangle(matrix, path)
            assert path.stat().st_size == 2 * size * (size + 1)
            room = torch.zeros(size, size)
            stored.fill(room)
            for found in (stored.read(), room):
                assert torch.equal(found.view(torch.int32), matrix.view(torch.int32))


def test_what_is_above_the_diagonal_is_not_stored(tmp_path: Path) -> None:
    matrix = torch.arange(1.0, 10.0).view(3, 3)
    assert store_triangle(matrix.T, tmp_path / "0").read().tolist() == [[1, 0, 0], [2, 5, 0], [3, 6, 9]]


def factors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 9, generator=generator), torch.randn(3, 9, generator=generator)
    return [torch.linalg.cholesky(each @ each.T) for each in rows]


def test_a_stored_metric_is_the_metric(tmp_path: Path) -> None:
    metric = Metric(*factors(), weight=1.5)
    stored = store(metric, tmp_path / "a", tmp_path / "f")
    generator = torch.Generator().manual_seed(1)
    rows, writes = torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)
    assert torch.equal(stored.scaled(2.0).solve_outputs(writes), metric.scaled(2.0).solve_outputs(writes))
    assert torch.equal(stored.solve_inputs(rows), metric.solve_inputs(rows))
    assert stored.scaled(3.0).price(writes[:3, :1] @ rows[:1]) == metric.scaled(3.0).price(writes[:3, :1] @ rows[:1])
    assert not stored.closed


def test_a_closed_metric_stays_closed_and_a_shared_factor_is_stored_once(tmp_path: Path) -> None:
    inputs, outputs = factors()
    first = store(Metric(inputs, outputs), tmp_path / "a", tmp_path / "f")
    closed = store(Metric(torch.zeros(2, 2), outputs), tmp_path / "b", first.factors[1])
    assert closed.closed and closed.scaled(2.0).closed
    assert torch.equal(closed.inputs, torch.zeros(2, 2))
    assert torch.equal(closed.outputs, outputs)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "f"]


def test_a_full_disk_and_a_file_that_was_cut_short_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    inputs, _ = factors()
    with pytest.raises(IncompleteError, match="No space is left"):
        store_triangle(inputs, Path("/dev/full"))
    stored = store_triangle(inputs, tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(IncompleteError, match="ends too early"):
        stored.read()
    (tmp_path / "a").unlink()
    with pytest.raises(IncompleteError, match="could not be read"):
        StoredTriangle(tmp_path / "a", 5, torch.device("cpu")).read()
