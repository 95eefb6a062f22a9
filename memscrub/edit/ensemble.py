"""Which mode suits a text: the one that costs least of those that also hold where nobody looked when choosing.

Every mode is tried on the model as it is and taken back. Knows disturbance as a number that the caller measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.locate import Locator
from memscrub.edit.modes import Mode, available_modes
from memscrub.edit.output_vectors import kept_on_error, put_back
from memscrub.edit.per_text import PerTextSettings, edit_text, measured, suffix_begin
from memscrub.errors import NumericalError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText


def choose_mode(
    editable: EditableModel,
    text: TokenText,
    settings: PerTextSettings,
    *,
    chosen_on: Sequence[TokenText] = (),
    held_out: Sequence[TokenText],
    disturbance: Callable[[EditableModel], float],
    modes: Sequence[Mode] | None = None,
    locator: Locator | None = None,
) -> Mode | None:
    """The least disturbing mode that breaks the text's suffix in every context; None when no mode does.

    A mode is kept when its edit does what the settings ask for behind the text's own prefix and in the contexts
    `chosen_on`. Of those, in order of `disturbance` of the model so edited, the first that also holds in the
    `held_out` contexts is chosen. A context ends with the text's suffix (`with_shorter_prefix`); one in which the
    suffix never came out holds under every mode, and so decides nothing. By default all modes are tried that the
    tokenizer has the tokens for. The model is left as it was, whatever happens. Raises as `edit_text` does, and
    UsageError for a context that does not end with the suffix.
    """
    begin = suffix_begin(text, settings)
    for context in (*chosen_on, *held_out):
        _suffix_of(context, text, begin)
    locator = locator or Locator(editable.loaded, editable.sites, settings.rank)
    tried = available_modes(editable.loaded.tokenizer, settings.marker) if modes is None else modes
    ranking: list[tuple[float, int, Mode, bool]] = []
    for order, mode in enumerate(tried):
        with kept_on_error(editable, locator) as before:
            outcome = edit_text(editable, text, mode, settings, locator)
            if outcome.holds(settings) and _hold(editable.loaded, chosen_on, text, begin, settings):
                everywhere = _hold(editable.loaded, held_out, text, begin, settings)
                ranking.append((_finite(disturbance(editable)), order, mode, everywhere))
            put_back(editable, before, locator)
    return next((mode for _, _, mode, everywhere in sorted(ranking) if everywhere), None)


def with_shorter_prefix(loaded: LoadedModel, text: TokenText, settings: PerTextSettings, length: int) -> TokenText:
    """The same suffix behind the last `length` tokens of its prefix: a context for `choose_mode`."""
    begin = suffix_begin(text, settings)
    tokens = loaded.prompt + text.tokens[max(begin - length, len(loaded.prompt)) :]
    return replace(text, tokens=tokens, start=len(loaded.prompt), secrets=())


def predicted_disturbance(metrics: Sequence[Metric]) -> Callable[[EditableModel], float]:
    """1/2 sum over sites of tr(F D C D^T) of the whole edit D (see `disturbance`); one metric per editable site."""

    def predict(editable: EditableModel) -> float:
        triples = zip(editable.sites, editable.deltas, metrics, strict=True)
        return sum(metric.price(site.part(delta)) for site, delta, metric in triples)

    return predict


def _finite(disturbance: float) -> float:
    if not math.isfinite(disturbance):
        raise NumericalError("the disturbance of an edit is not finite; no mode can be chosen by it.")
    return disturbance


def _hold(
    loaded: LoadedModel, contexts: Sequence[TokenText], text: TokenText, begin: int, settings: PerTextSettings
) -> bool:
    """Whether the suffix is broken, as the settings ask for, in all of these contexts."""
    return all(measured(loaded, context, _suffix_of(context, text, begin), ()).holds(settings) for context in contexts)


def _suffix_of(context: TokenText, text: TokenText, begin: int) -> int:
    """Where the text's suffix begins in a context."""
    suffix = text.tokens[begin:]
    start = len(context.tokens) - len(suffix)
    if start < 1 or context.tokens[start:] != suffix:
        raise UsageError(f"a context given for the text '{text.id}' does not end with its suffix behind a prefix.")
    return start
