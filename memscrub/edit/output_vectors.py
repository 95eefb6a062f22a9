"""New values for chosen output vectors: the closed form that lets another token outbid one, and writing them.

Tensors in, values out; knows neither texts nor how neurons are chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from memscrub.edit.editable import EditableModel
from memscrub.edit.locate import Locator
from memscrub.errors import NumericalError
from memscrub.models.sites import as_columns

# New output vectors `[d]`, float32, by (index of site, column).
Changes = dict[tuple[int, int], Tensor]


def least_change(vectors: Tensor, direction: Tensor, wanted: Tensor) -> Tensor:
    """min |v' - v|^2 subject to u·v' = tau, for each column v of `vectors` `[d, n]` and tau of `wanted` `[n]`.

    By Lagrange's multiplier v' = v + ((tau - u·v) / |u|^2) u: rank one. Raises NumericalError when the direction
    u `[d]` is zero, as that of a token which no training ever touched can be.
    """
    length = direction.square().sum()
    if not float(length) > 0:
        raise NumericalError("the unembedding of a token to be edited in or out is zero; choose another mode.")
    return vectors + direction[:, None] * ((wanted - direction @ vectors) / length)


def outbid(vectors: Tensor, activations: Tensor, target: Tensor, rival: Tensor | None, margin: float) -> Tensor:
    """The output vectors nearest to `vectors` `[d, n]` that no longer speak for the target, `[d, n]`.

    `target` and `rival` `[d]` are the directions of two tokens (`Locator.direction`), s `[n]` the signs of the
    neurons' activations a:

    - With a rival: s u_rival·v' >= s tau, tau = u_target·v + s margin. What the neuron writes, a v', then says
      at least |a| margin more to the rival than a v said to the target. A neuron with a < 0 writes the target by
      a low u_target·v; its u_rival·v' must be lower still. A vector that satisfies this stays.
    - Without one (`suppress`): u_target·v' = tau, tau = u_target·v - s margin. What the neuron writes then says
      |a| margin less to the target, and every vector is changed.

    Where a is 0 the neuron writes nothing, and its vector stays.
    """
    signs = activations.sign()
    own = target @ vectors
    if rival is None:
        return least_change(vectors, target, own - signs * margin)
    wanted = own + signs * margin
    holds = signs * (rival @ vectors) >= signs * wanted
    return torch.where(holds, vectors, least_change(vectors, rival, wanted))


def live_vectors(editable: EditableModel, site: int, columns: Sequence[int]) -> Tensor:
    """These output vectors as the model has them now, `[d, n]` in float32."""
    return editable.loaded.weight(editable.sites[site])[:, list(columns)].float()


def write_vectors(editable: EditableModel, changes: Mapping[tuple[int, int], Tensor], locator: Locator) -> None:
    """Put these output vectors into the model, rounded as they will be stored; the locator looks at them anew.

    Raises NumericalError when one is not finite in the stored precision; the model is then half edited (see
    `kept_on_error`).
    """
    deltas = list(editable.deltas)
    for index in sorted({site for site, _ in changes}):
        columns = [column for site, column in changes if site == index]
        site = editable.sites[index]
        originals = as_columns(editable.originals[site.tensor], site.orientation)[:, columns].float()
        deltas[index] = deltas[index].clone()
        deltas[index][:, columns] = torch.stack([changes[index, column] for column in columns], dim=1) - originals
        locator.forget(index, columns)
    editable.apply(deltas)


def put_back(editable: EditableModel, deltas: Sequence[Tensor], locator: Locator) -> None:
    """Return to an earlier edit; to the original weights, bit for bit, where that was none."""
    for index, (now, then) in enumerate(zip(editable.deltas, deltas, strict=True)):
        if index in locator.indices:
            locator.forget(index, (now != then).any(0).nonzero()[:, 0].tolist())
    if any(bool(delta.any()) for delta in deltas):
        editable.apply(deltas)
    else:
        editable.restore()


@contextlib.contextmanager
def kept_on_error(editable: EditableModel, locator: Locator) -> Iterator[list[Tensor]]:
    """Whatever is raised inside, the model is left as it was before; yields the edit it had then."""
    before = [delta.clone() for delta in editable.deltas]
    done = False
    try:
        yield before
        done = True
    finally:
        if not done:
            put_back(editable, before, locator)
