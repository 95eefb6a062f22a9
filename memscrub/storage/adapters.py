"""Open a LoRA adapter and say which matrices it adds to which tensor of its base; computes nothing.

Only what can be added to the stored weights exactly is read: plain LoRA, with rsLoRA's scale and ranks or scales of
single modules. Everything else that PEFT offers is refused by its name, because leaving it out would measure a model
that nobody serves. No pickle is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscrub.errors import CheckpointError
from memscrub.storage.checkpoint import Checkpoint, read_object
from memscrub.storage.files import cache_link_roots, list_files
from memscrub.storage.hub import download, parse_hub_id
from memscrub.storage.safetensors_header import TensorInfo, read_header
from memscrub.storage.untrusted_config import soon_matched

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PICKLED = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True),"
    " 'adapter_model.safetensors')\""
)
_PEFT = "merge it with PEFT (`merge_and_unload()`, then `save_pretrained()`) and name the result"
# Entries of adapter_config.json that say nothing about what is added to the weights, or that are read below.
_KNOWN = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha"),
        *("lora_dropout", "megatron_core", "merge_weights", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("revision", "runtime_config", "target_modules", "task_type", "use_rslora", "rank_pattern", "alpha_pattern"),
    }
)
# Other initialisations subtract something from the base's weights while the adapter is trained.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<which>[AB])\.weight", re.ASCII)
# Names that embeddings have in the families of memscrub's table. What PEFT stores for one has other names.
_EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings")
_HEADS = ("lm_head", "embed_out")
_SHOWN = re.compile(r"[\w./@-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to one module: `scale` times B `[d, r]` times A `[r, f]`."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter whose weights were checked to be well-formed safetensors; read-only."""

    source: str  # as the user named it
    path: Path
    pairs: tuple[Pair, ...]
    base: str | None  # the base it names, where that can be shown

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.path / WEIGHTS


def base_of(config: Mapping[str, Any]) -> str | None:
    """The base model that an adapter names, as far as it can be put into a message; it is a stranger's text."""
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and _SHOWN.fullmatch(base) else None


def open_adapter(source: str | Path) -> Adapter:
    """Open and check the directory of a LoRA adapter, as PEFT saves it, or a hub id `owner/name[@revision]`.

    Raises:
        CheckpointError: not an adapter, not safetensors, malformed, or of a kind that cannot be added exactly.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        hub = None if os.path.lexists(path) else parse_hub_id(str(source))
        if hub is None:
            raise CheckpointError(f"The adapter {source} is not a directory; name the one that holds {CONFIG}.")
        path = download(*hub, single=WEIGHTS, index=CONFIG)
    root = Path(os.path.realpath(path))
    links = (root, *cache_link_roots(root))
    files = list_files(root, error=CheckpointError, link_roots=links, skip=frozenset({".git", ".cache"}))
    if CONFIG not in files:
        raise CheckpointError(f"{path} is no adapter: it has no {CONFIG}.")
    if WEIGHTS not in files:
        if "adapter_model.bin" in files:
            raise CheckpointError(
                f"{path} holds a pickled adapter, which memscrub never loads; where you trust its source, run there:"
                f" {_PICKLED}"
            )
        raise CheckpointError(f"{path} has no {WEIGHTS}; download the adapter again.")
    config = read_object(root, CONFIG)
    _check_kind(config)
    tensors = read_header(root / WEIGHTS, WEIGHTS)
    return Adapter(str(source), root, tuple(_pairs(config, tensors)), base_of(config))


def stored_name(ckpt: Checkpoint, module: str) -> str:
    """The stored name of a module's weight, which may lack or have the model's outer prefix.

    Raises CheckpointError when no tensor, or more than one, could be meant, and for a head that is the embedding.
    """
    name = f"{module}.weight"
    inner = name.partition(".")[2]
    found = [name] if name in ckpt.tensors else sorted({inner} & ckpt.tensors.keys())
    found = found or [stored for stored in ckpt.tensors if stored.partition(".")[2] == name]
    head = module.rpartition(".")[2] in _HEADS
    # Where config.json does not say so, the family decides, and transformers writes it down for each.
    if head and (not found or ckpt.config.get("tie_word_embeddings") is not False):
        raise CheckpointError(
            f"The adapter changes the output head '{module}', which this base shares with its embedding, or does not"
            f" say that it does not; {_PEFT}."
        )
    if len(found) != 1:
        raise CheckpointError(
            f"The adapter changes '{module}', which the base stores under {len(found)} names; name the base that the"
            " adapter was trained on."
        )
    return found[0]


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for everything that is more, or something else, than B times A added to a weight."""
    kind = config.get("peft_type")
    if kind != "LORA":
        shown = kind if isinstance(kind, str) and _SHOWN.fullmatch(kind) else "of an unknown kind"
        raise CheckpointError(f"The adapter is {shown}, not LORA, which is all that memscrub merges; {_PEFT}.")
    initial = config.get("init_lora_weights")
    if initial not in _PLAIN_INITIALISATIONS:
        shown = initial if isinstance(initial, str) and _SHOWN.fullmatch(initial) else "other"
        raise CheckpointError(
            f"The adapter was initialised the '{shown}' way, which changes the base's weights too; {_PEFT}."
        )
    for key, value in config.items():
        if key not in _KNOWN and value:
            shown = key if _SHOWN.fullmatch(key) else "an unknown setting"
            raise CheckpointError(f"The adapter uses {shown}, which memscrub does not merge; {_PEFT}.")


def _pairs(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[Pair]:
    """The pairs of matrices in order of their names; every tensor belongs to one."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(info.shape) != 2 or info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"The adapter stores the tensor {name[:200]!r}, which is no matrix of plain LoRA; {_PEFT}."
            )
        halves.setdefault(match["module"], {})[match["which"]] = info
    if not halves:
        raise CheckpointError(f"The adapter stores no tensors in {WEIGHTS}; download or save it again.")
    for module, half in sorted(halves.items()):
        if half.keys() != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1] or not half["A"].shape[0]:
            raise CheckpointError(f"The adapter's matrices of '{module}' do not fit one another; save it again.")
        if module.rpartition(".")[2] in _EMBEDDINGS or not _is_loaded(config, module):
            raise CheckpointError(
                f"The adapter stores matrices for '{module}', which PEFT would leave out: target_modules and its like"
                f" in {CONFIG} do not name it, or it is an embedding; save the adapter again."
            )
        yield Pair(module, half["A"], half["B"], _scale(config, module, half["A"].shape[0]))


def _is_loaded(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adds the adapter to a module, as its `check_target_module_exists` decides.

    Matrices of other modules it passes over without a word: with them added, a model would be measured that nobody
    serves.
    """
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") and _is_named(config, "exclude_modules", module):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return module.rpartition(".")[2] not in _HEADS
    if not targets or not _is_named(config, "target_modules", module):
        return False
    if isinstance(targets, str) or module in targets or layers is None or layers == []:
        return True
    return _layer_of(config, module) in (layers if isinstance(layers, list) else [layers])


def _is_named(config: Mapping[str, Any], entry: str, module: str) -> bool:
    """Whether an entry of adapter_config.json, a regular expression or a list of ends of names, means a module."""
    value = config[entry]
    if isinstance(value, str):
        if not soon_matched(value, module):
            raise CheckpointError(f"{CONFIG} has {entry} that memscrub does not read; {_PEFT}.")
        return re.fullmatch(value, module) is not None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{CONFIG} has no usable {entry}; download or save the adapter again.")
    return any(module == name or module.endswith(f".{name}") for name in value)


def _layer_of(config: Mapping[str, Any], module: str) -> int | None:
    """The number of a module's layer, found as PEFT finds it: behind a name of `layers_pattern`, or the first one."""
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in names):
        raise CheckpointError(f"{CONFIG} has a layers_pattern that is more than a name; {_PEFT}.")
    parts = module.split(".")
    for name in names or [None]:
        for at in range(1 if name is None else 0, len(parts) - 2):
            if parts[at + 1].isdecimal() and name in (None, parts[at]):
                return int(parts[at + 1])
    return None


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor for one module: alpha over the rank, over the rank's square root with rsLoRA."""
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    stated = _of_module(config.get("rank_pattern"), module, config.get("r"))
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        raise CheckpointError(f"{CONFIG} has no usable lora_alpha; download or save the adapter again.")
    if stated != rank:
        raise CheckpointError(f"{CONFIG} states another rank for '{module}' than is stored; save the adapter again.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """The entry of a `rank_pattern` or `alpha_pattern` that fits a module, found as PEFT finds it."""
    if not pattern:
        return default
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{CONFIG} has a pattern that is no JSON object; download or save the adapter again.")
    for key, value in pattern.items():
        # A stranger's regular expression can take for ever; names with their wildcard are all that PEFT writes.
        if not re.fullmatch(r"\^?[\w.\\*]{1,200}", key, re.ASCII) or key.count("*") > 2:
            raise CheckpointError(f"{CONFIG} has a pattern that is more than a module's name; {_PEFT}.")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            raise CheckpointError(f"{CONFIG} has a pattern that cannot be read; save the adapter again.") from None
    return default
