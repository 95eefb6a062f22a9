"""Loading a checkpoint as a transformers model with its tokenizer and the sites an edit may touch; with
`continuation` the only place that touches `transformers`; knows no measures and writes nothing.

No pickle is loaded and no remote code runs: weights come from safetensors only, `trust_remote_code` is false.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.errors import CheckpointError, NumericalError, UsageError
from memscrub.models.architecture import Family, family_of
from memscrub.models.lean_weights import LeanWeights, lean_dtype, widen_constants
from memscrub.models.sites import Site, as_columns
from memscrub.models.spreading import SPREAD, spread
from memscrub.storage.checkpoint import Checkpoint, read_object
from memscrub.storage.untrusted_config import (
    Reading,
    check_counts,
    check_size,
    refuse_tokenizer_detours,
    without_kernels,
)

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# A logits tensor of one batch stays below this many bytes, whatever the vocabulary.
LOGITS_BYTES = 32 * 2**20
# Hidden states are projected in pieces with so many bytes of logits: what a CPU's caches hold, what keeps a GPU busy.
PIECE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
_TOKENIZER = "tokenizer_config.json"
# Largest difference, relative to the largest logit, at which two ways to the same logits count as one.
SAME_LOGITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured or edited, with what is needed to feed it texts."""

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    family: Family
    prompt: tuple[int, ...]  # token ids put before every text: the beginning-of-text token where there is one
    device: torch.device
    dtype: torch.dtype
    vocabulary: int
    max_positions: int
    lean: LeanWeights | None = field(default=None, repr=False)  # where the weights stay as they are stored

    def weight(self, site: Site) -> Tensor:
        """The site's output vectors as columns, a view `[d, f]` onto the live parameter."""
        return as_columns(self.parameter(site), site.orientation)

    def parameter(self, site: Site) -> Tensor:
        """The live parameter of a site, as stored; of an expert's, its part."""
        return self.tensor(site.tensor)

    def tensor(self, name: str) -> Tensor:
        """The live values behind a name (`Site.tensor`): of a parameter, or of one expert's part of it."""
        path, _, expert = name.removesuffix("]").partition("[")
        values = self.model.get_parameter(path).data
        return values[int(expert)] if expert else values

    def batch_tokens(self, wanted: int, *, gradients: bool = False) -> int:
        """Tokens per forward pass: what the policy wants, less where the logits would fill the memory."""
        room = LOGITS_BYTES // (4 * self.vocabulary) // (2 if gradients else 1)
        return max(1, min(wanted, room))

    @property
    def piece(self) -> int:
        """Positions whose logits over the vocabulary are held at once where hidden states are projected."""
        return max(1, PIECE_BYTES.get(self.device.type, LOGITS_BYTES) // (4 * self.vocabulary))

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits `[batch, length, vocabulary]` in float32 for right-padded ids `[batch, length]`.

        No attention mask is needed: padding comes after the text, and every position sees only its past.
        """
        output: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return output.float().to(self.device)

    @cached_property
    def projects(self) -> bool:
        """Whether `unembed` makes the model's own logits of hidden states; looked up on a few tokens at first use.

        Where it does not (the head does something memscrub does not know), `features` are the logits themselves.
        """
        if not isinstance(self._base, nn.Module):
            return False
        count = min(8, self.max_positions)
        ids = ((torch.arange(count, device=self.device) * 7919 + 1) % self.vocabulary)[None]
        with torch.inference_mode():
            own, found = self.logits(ids), self._head(self._base(input_ids=ids, use_cache=False)[0]).to(self.device)
            same = own.shape == found.shape and (own - found).abs().max() <= SAME_LOGITS[self.dtype] * own.abs().max()
        return bool(same)

    @property
    def _base(self) -> Any:
        """The model without its head; None for a model that does not keep the two apart."""
        return getattr(self.model, self.family.blocks.partition(".")[0], None)

    def features(
        self, tokens: Tensor, past: Any = None, *, keep: bool = False, positions: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """What `unembed` makes logits of, `[batch, length, ...]`, for right-padded ids `[batch, length]` on the device.

        `past` is a cache of the tokens before these; with `keep` the cache of all is returned, else None. `positions`
        `[batch, length]` says where in a text the ids stand, to models that want to be told.
        """
        cached = keep or past is not None
        model = self._base if self.projects else self.model
        told = positions is not None and "position_ids" in signature(model.forward).parameters
        where = {"position_ids": positions} if told else {}
        output: Any = model(input_ids=tokens, past_key_values=past, use_cache=cached, **where)
        features: Tensor = output[0] if self.projects else output.logits
        return features.to(self.device), output.past_key_values if cached else None

    def unembed(self, features: Tensor) -> Tensor:
        """Next-token logits `[n, vocabulary]` in float32 from features `[n, ...]`."""
        return self._head(features).to(self.device) if self.projects else features.float()

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        config: Any = self.model.config
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits.float()


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else MPS where torch offers it, else the CPU."""
    if name == "auto":
        name = _best_device()
    with contextlib.suppress(RuntimeError, AssertionError, ImportError):
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type != "meta":  # which has shapes and no values
            return device
    raise UsageError(f"the device '{name}' is not available here; use --device cpu, or auto to let memscrub choose.")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(name: str) -> torch.dtype:
    """The arithmetic to compute in; "auto" is float32, in which a verdict depends least on rounding."""
    if name == "auto":
        return torch.float32
    if name not in DTYPES:
        raise UsageError(f"the dtype '{name}' is not known; use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(ckpt: Checkpoint, *, device: str = "auto", dtype: str = "auto", lean: bool | None = None) -> LoadedModel:
    """Load a checkpoint for measuring: evaluation mode, no parameter asks for gradients.

    With `lean` the weights stay in their stored dtype where that gives the same results (`lean_weights`); None: for
    large checkpoints. The device "spread" is all GPUs together (`spreading`). Raises CheckpointError when transformers
    cannot read it or a weight is missing, NumericalError when a weight is not finite.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    family = family_of(ckpt.config)
    where, arithmetic = choose_device("auto" if device == SPREAD else device), choose_dtype(dtype)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    lean = False if device == SPREAD else lean
    narrow = lean_dtype(ckpt, wanted=lean) if arithmetic is torch.float32 else None
    check_counts(ckpt.config, len(ckpt.tensors))
    if _TOKENIZER in ckpt.files:
        refuse_tokenizer_detours(read_object(ckpt.path, _TOKENIZER))
    with Reading(ckpt.path), _quiet_transformers():
        config = without_kernels(AutoConfig.from_pretrained(ckpt.path, **local))
        with torch.device("meta"):
            sketch = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        check_size(sketch, (info.shape for info in ckpt.tensors.values()))
        tokenizer = AutoTokenizer.from_pretrained(ckpt.path, **local)
        found: Any = AutoModelForCausalLM.from_pretrained(
            ckpt.path,
            config=config,
            dtype=narrow or arithmetic,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: `_check_loading` names the tensor
            **local,
        )
    model, info = found
    _check_loading(ckpt, info)
    _check_tokenizer(ckpt, tokenizer)
    # A checkpoint's own generation settings (sampling, penalties, end tokens) would hide what it knows.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    if narrow is not None and not widen_constants(model):
        return load_model(ckpt, device=device, dtype=dtype, lean=False)
    model = model.to("cpu" if device == SPREAD else where).eval().requires_grad_(False)
    _check_finite(ckpt, model)
    if device == SPREAD:
        model = spread(model)
    begin = tokenizer.bos_token_id
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        family=family,
        prompt=() if begin is None else (int(begin),),
        device=where,
        dtype=arithmetic,
        vocabulary=int(model.get_output_embeddings().weight.shape[0]),
        max_positions=_max_positions(config),
        lean=None if narrow is None else LeanWeights(model, arithmetic),
    )


def _max_positions(config: Any) -> int:
    """How many tokens the model reads at once; MPT has a name of its own for it."""
    stated = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return int(next((length for length in stated if length), 2**20))


def _check_loading(ckpt: Checkpoint, info: Mapping[str, Any]) -> None:
    # transformers fills a missing weight with random numbers and only warns: measuring that would be a lie.
    if missing := sorted(info.get("missing_keys") or ()):
        raise CheckpointError(
            f"{ckpt.path}: the weight '{missing[0]}' is missing from the shards (and {len(missing) - 1} more);"
            " the checkpoint is incomplete."
        )
    if wrong := sorted(info.get("mismatched_keys") or ()):
        name, stored, expected = wrong[0]
        raise CheckpointError(
            f"{ckpt.path}: the weight '{name}' has the shape {list(stored)}, which is not the shape config.json asks"
            f" for, {list(expected)}; check that config.json and the shards belong together."
        )


def _check_tokenizer(ckpt: Checkpoint, tokenizer: Any) -> None:
    # Where a protected text begins, and its secrets, are told by the characters that each token stands for.
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{ckpt.path}: its tokenizer ({type(tokenizer).__name__}) does not say which characters a token stands for;"
            " memscrub reads those that have a tokenizer.json, or can be turned into one."
        )


def _finite(values: Tensor) -> bool:
    # Piece by piece: what the check makes of a large matrix takes as much room as the matrix.
    piece = 2**22
    return all(bool(torch.isfinite(values[at : at + piece]).all()) for at in range(0, len(values), piece))


def _check_finite(ckpt: Checkpoint, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach().flatten()):
            raise NumericalError(
                f"{ckpt.path}: the weight '{name}' holds NaN or infinite values;"
                " nothing can be measured on this checkpoint."
            )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or chatter of transformers while loading; its settings are put back afterwards."""
    import transformers

    logging: Any = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
