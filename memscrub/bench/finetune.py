"""Fine-tuning baselines, which unlearn texts by gradient steps as people do today, to hold the closed-form edit
against; knows neither the edit nor how anything is measured.

Three methods, all in float32 with Adam, a linear warm-up and then a constant learning rate:

- negative preference optimization on all weights (Zhang et al. 2024, arXiv 2404.05868),
- gradient ascent on all weights (Jang et al. 2023, arXiv 2210.01504),
- gradient ascent on the 0.1% of the weights with the largest gradient (Stoehr et al. 2024, arXiv 2403.19851),

each plus `keep_weight` times KL(original || current) on retain text. Because the learning rate stays constant, a
run measured on its way at step 60 is the run that ends at step 60.

    with restored(loaded) as originals:
        tune(loaded, texts, rows, recipe, seed=0, at_step=lambda step, seconds: measure_something())
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from memscrub.bench.clock import now
from memscrub.bench.finetune_losses import ForgetTerm, KeepTerm, largest_share
from memscrub.errors import NumericalError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

# The gradient's norm is clipped to this, as transformers' Trainer does by default.
CLIP = 1.0


class Method(str, Enum):
    """What is minimised, and over which weights."""

    NPO = "npo"  # negative preference optimization, all weights
    ASCENT = "gradient-ascent"  # all weights
    MASKED = "masked-ascent"  # gradient ascent on the weights with the largest gradient


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run.

    `steps`: at which step counts it is measured, ascending; the last ends it. `keep_weight`: factor of the KL term
    per retain token (0: no such term). `beta`: NPO's inverse temperature. A step sees `batch_texts` texts and
    `batch_rows` rows of each kind of retain text. `share`: of the block matrices' weights, how many the masked
    method updates. `warm_up`: steps until the learning rate is reached. `keep_starts`: keep the starts of texts as
    well as the running stream; without it texts go more cheaply, and every text's start with them.
    """

    name: str
    method: Method
    learning_rate: float
    steps: tuple[int, ...]
    keep_weight: float
    beta: float = 0.1
    batch_texts: int = 8
    batch_rows: int = 8
    share: float = 0.001
    warm_up: int = 10
    keep_starts: bool = True

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise UsageError(f"the steps of the recipe '{self.name}' must be positive and ascending.")


def grid() -> tuple[Recipe, ...]:
    """The settings that baselines are tried with: each is judged by its best row, not by one guess of ours.

    Ascent counts a mean per token and NPO a sum over the text, so ascent takes larger keep weights.
    """
    return (
        *_grid(Method.NPO, (1e-4,), (1.0,), (60, 120, 240)),
        *_grid(Method.NPO, (1e-4,), (1.0,), (60, 120, 240), keep_starts=False),
        *_grid(Method.ASCENT, (2e-5,), (0.0, 50.0), (20, 40)),
        *_grid(Method.MASKED, (1e-3, 5e-3), (5.0,), (20, 40)),
    )


def large_grid() -> tuple[Recipe, ...]:
    """The same methods over more settings: about an hour for seven million parameters on two cores."""
    return (
        *_grid(Method.NPO, (5e-5, 1e-4, 2e-4), (1.0, 5.0), (60, 120, 240)),
        *_grid(Method.NPO, (5e-5, 1e-4, 2e-4), (1.0, 5.0), (60, 120, 240), keep_starts=False),
        *_grid(Method.ASCENT, (2e-5, 1e-4), (0.0, 50.0), (20, 60, 120)),
        *_grid(Method.MASKED, (1e-3, 3e-3, 5e-3), (5.0, 50.0), (20, 60, 120)),
    )


def _grid(
    method: Method,
    rates: Sequence[float],
    weights: Sequence[float],
    steps: tuple[int, ...],
    *,
    keep_starts: bool = True,
) -> Iterator[Recipe]:
    for rate in rates:
        for weight in weights:
            name = f"{method.value}, lr {rate:g}, keep {weight:g}" + ("" if keep_starts else " (no starts)")
            yield Recipe(name, method, rate, steps, weight, keep_starts=keep_starts)


@contextlib.contextmanager
def restored(loaded: LoadedModel) -> Iterator[Mapping[str, Tensor]]:
    """Whatever happens inside, every parameter comes back bit for bit, in the same storage, gradients freed.

    Yields copies of the original parameters by their name in memory, as `locality.compare` wants them; a tied
    weight is there once. `requires_grad` and the modules' training modes come back too.
    """
    originals = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    live = [(parameter, parameter.data) for parameter in loaded.model.parameters()]
    with _settings_kept(loaded.model):
        try:
            yield originals
        finally:
            for (parameter, data), value in zip(live, originals.values(), strict=True):
                parameter.data = data.copy_(value)


@contextlib.contextmanager
def rounded(loaded: LoadedModel, stored: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, the parameters named in `stored` hold what would be read back from disk in that dtype.

    For measuring what a tuned checkpoint would ship; the unrounded weights come back for further steps.
    """
    live: dict[str, Tensor] = {}
    try:
        for name, dtype in stored.items():
            parameter = loaded.model.get_parameter(name)
            live[name] = parameter.data
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        yield
    finally:
        for name, value in live.items():
            loaded.model.get_parameter(name).data = value


def tune(
    loaded: LoadedModel,
    texts: Sequence[TokenText],
    retain: Sequence[Tensor],
    recipe: Recipe,
    *,
    seed: int,
    at_step: Callable[[int, float], None],
    min_prefix_tokens: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Fine-tune the live model as the recipe says, so that it unlearns the texts; the caller restores it.

    `retain`: tensors of token ids `[rows, width]`, the same ones that the edit takes its statistics from. The loss
    covers a text's tokens from `first_judged(min_prefix_tokens)` on. `at_step(step, seconds)` is called at the
    recipe's steps, the weights live, with the seconds of training so far (preparation included, the time inside
    `at_step` not); returned are the seconds of the whole run. `progress` is told the steps done. Dropout is off.
    The same seed gives the same weights.

    Raises NumericalError when the loss is not finite, and UsageError for a model not in float32, for texts without
    a token to unlearn, and for a keep term without retain rows.
    """
    if loaded.dtype is not torch.float32:
        raise UsageError("fine-tuning needs float32, because in less its small steps are rounded away.")
    retain = [part for part in retain if part.numel() and part.shape[1] > 1]
    if recipe.keep_weight and not retain:
        raise UsageError(f"the recipe '{recipe.name}' keeps the model close on retain text, but there is none.")
    with _settings_kept(loaded.model), torch.enable_grad():
        spent, since = 0.0, now(loaded.device)
        loaded.model.eval().requires_grad_(True)
        beta = recipe.beta if recipe.method is Method.NPO else None
        forget = ForgetTerm(loaded, texts, min_prefix_tokens=min_prefix_tokens, beta=beta)
        keep = KeepTerm(loaded, retain, recipe.keep_weight) if recipe.keep_weight else None
        masks = _masks(loaded, forget, recipe.share) if recipe.method is Method.MASKED else None
        for step in _steps(loaded, recipe, _losses(forget, keep, recipe, seed), masks):
            progress(step)
            if step in recipe.steps:
                spent += now(loaded.device) - since
                at_step(step, spent)
                since = now(loaded.device)
    return spent


def _steps(
    loaded: LoadedModel, recipe: Recipe, losses: Iterator[float], masks: Mapping[nn.Parameter, Tensor] | None
) -> Iterator[int]:
    """Take the recipe's steps, yielding each one's number when the weights have moved."""
    tuned = [*loaded.model.parameters()] if masks is None else [*masks]
    optimizer = torch.optim.AdamW(tuned, lr=recipe.learning_rate, weight_decay=0.0)
    for step in range(1, recipe.steps[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, step / recipe.warm_up)
        loss = next(losses)
        for parameter, mask in (masks or {}).items():
            assert parameter.grad is not None
            parameter.grad.mul_(mask)  # Adam never moves a weight whose gradient was always zero
        norm = float(nn.utils.clip_grad_norm_(tuned, CLIP))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NumericalError(
                f"fine-tuning with '{recipe.name}' diverged: its loss is not finite at step {step};"
                " use a lower learning rate or a higher keep weight."
            )
        optimizer.step()
        optimizer.zero_grad()
        yield step


def _losses(forget: ForgetTerm, keep: KeepTerm | None, recipe: Recipe, seed: int) -> Iterator[float]:
    """The loss of one batch after another; each adds its gradients to the parameters'."""
    # A generator for each stream: recipes that differ in one thing see the same texts in the same order.
    texts = _draws(len(forget.texts), recipe.batch_texts, seed)
    kinds = [] if keep is None else [_draws(len(p), recipe.batch_rows, seed + 1 + i) for i, p in enumerate(keep.retain)]
    while True:
        loss = forget.backward(next(texts))
        if keep is not None:
            loss += keep.backward([next(rows) for rows in kinds])
        yield loss


def _masks(loaded: LoadedModel, forget: ForgetTerm, share: float) -> dict[nn.Parameter, Tensor]:
    """Which weights the masked method updates, for every parameter that has one of them; no other asks for gradients.

    By the gradient of the whole objective over all texts. At the original weights the KL term is at its minimum and
    adds nothing to it, so only the forget term is computed. Embeddings, biases and norms are left out, as in the
    paper.
    """
    inside = f"{loaded.family.blocks}."
    loaded.model.requires_grad_(False)
    matrices = [p for name, p in loaded.model.named_parameters() if name.startswith(inside) and p.dim() > 1]
    for parameter in matrices:
        parameter.requires_grad_(True)
    forget.backward(range(len(forget.texts)))
    found = [(parameter, parameter.grad) for parameter in matrices if parameter.grad is not None]
    masks = largest_share([gradient for _, gradient in found], share)
    loaded.model.zero_grad()
    chosen = {parameter: mask for (parameter, _), mask in zip(found, masks, strict=True) if bool(mask.any())}
    for parameter in matrices:
        parameter.requires_grad_(parameter in chosen)
    return chosen


@contextlib.contextmanager
def _settings_kept(model: nn.Module) -> Iterator[None]:
    """`requires_grad` of every parameter and the training mode of every module come back; gradients are freed."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, training in modes:
            module.training = training


def _draws(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of the numbers below `count` without end, in random order, each number once before any comes again."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same order on every device
    size = min(size, count)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
