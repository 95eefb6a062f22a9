"""Shapes of well-known models for benchmarks/gpu.py, with random weights, and texts that such a model gives away.

What config.json says of each is here; its weights and its tokenizer are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.jobs.scanning import Inputs
from memscrub.models.architecture import family_of
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import parse_policy
from memscrub.storage.checkpoint import Checkpoint, TensorInfo
from memscrub.texts.protected import ProtectedList

# Locality limits are wide: what is timed is the edit, not the search for a share of the texts that fits.
POLICY = b"""schema = 1
name = "gpu"
[protected]
files = ["none.jsonl"]
[class.c]
max_verbatim_tokens = 16
[locality]
max_kl = 100.0
max_perplexity_ratio = 100.0
min_agreement = 0.01
"""
# Random tokens at the beginning of a text that a model is made to go on from.
GIVEN = 16


@dataclass(frozen=True)
class Shape:
    """A model's dimensions. `parameters` is the published number, held against the built model by the tests."""

    name: str
    source: str
    model_type: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    positions: int
    tied: bool
    parameters: int

    @property
    def config(self) -> dict[str, Any]:
        """As in config.json, with random weights wide enough that a greedy continuation is not one token repeated."""
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            # With the usual 0.02 the small shapes repeat themselves after a few tokens; at this width none does.
            "initializer_range": 1.6 / math.sqrt(self.width),
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def build(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
        """A model of this shape with random weights, made on the device in this dtype: nothing is copied there."""
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = self.config
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        return model.eval().requires_grad_(False)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm-360m", "HuggingFaceTB/SmolLM-360M", "llama",
              49152, 960, 2560, 32, 15, 5, 2048, True, 361_821_120),
        Shape("olmo-7b", "allenai/OLMo-7B-hf", "olmo",
              50304, 4096, 11008, 32, 32, 32, 2048, False, 6_888_095_744),
        Shape("llama-2-7b", "meta-llama/Llama-2-7b-hf", "llama",
              32000, 4096, 11008, 32, 32, 32, 4096, False, 6_738_415_616),
        Shape("tiny", "none: for the tests", "llama",
              512, 64, 128, 2, 4, 2, 256, False, 139_584),
    )
}  # fmt: skip


def matmul_parameters(model: nn.Module) -> tuple[int, int]:
    """Weights that a token is multiplied with in the blocks, and in the unembedding."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    blocks = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    return blocks, head.weight.numel()


def forward_flops(model: nn.Module, shape: Shape, length: int) -> int:
    """Floating-point operations of one teacher-forced pass over a text of `length` tokens, all but the first scored.

    A multiplication and an addition per weight of a matrix and token (Kaplan et al. 2020, arXiv 2001.08361, 2.1):
    2 * (weights of the blocks) * length + 2 * (weights of the unembedding) * (length - 1). And for attention, per
    layer, 2 * width for a score and 2 * width for its value, over the length * (length + 1) / 2 pairs that causal
    attention has. Padding, norms, softmax and rotary positions are not counted: a share of the peak made of this is
    a lower one.
    """
    blocks, head = matmul_parameters(model)
    attention = 4 * shape.width * shape.layers * length * (length + 1) // 2
    return 2 * blocks * length + 2 * head * (length - 1) + attention


def as_loaded(model: Any, shape: Shape, place: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model as memscrub holds it; without a tokenizer, because texts are token ids here."""
    return LoadedModel(
        model=model,
        tokenizer=None,
        family=family_of(shape.config),
        prompt=(),
        device=place,
        dtype=dtype,
        vocabulary=shape.vocabulary,
        max_positions=shape.positions,
    )


def random_rows(shape: Shape, rows: int, width: int, *, seed: int) -> Tensor:
    """Random token ids `[rows, width]`, on the CPU; at least one row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (max(1, rows), width), generator=generator)


def as_texts(rows: Iterable[Sequence[int]]) -> tuple[TokenText, ...]:
    """Token texts of class c."""
    return tuple(TokenText(f"text-{i}", "c", tuple(row), 0) for i, row in enumerate(rows))


def given_away(loaded: LoadedModel, shape: Shape, count: int, length: int) -> tuple[TokenText, ...]:
    """Texts that greedy decoding gives away: random tokens and what the model itself goes on with."""
    rows: list[list[int]] = []
    prompts = random_rows(shape, count, GIVEN, seed=2)
    for begin in range(0, count, 128):
        ids = prompts[begin : begin + 128].to(loaded.device)
        with torch.inference_mode():
            said = loaded.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length - GIVEN,
                pad_token_id=0,
            )
        rows += said.tolist()
    return as_texts(rows)


def as_inputs(loaded: LoadedModel, shape: Shape, texts: tuple[TokenText, ...]) -> Inputs:
    """What an edit starts from, with a checkpoint in bf16 that is on no disk."""
    tensors = {
        name: TensorInfo(name, "model.safetensors", "BF16", tuple(value.shape), 0, 0)
        for name, value in loaded.model.named_parameters()
    }
    ckpt = Checkpoint(Path("none"), (), {name: info.shard for name, info in tensors.items()}, shape.config, tensors)
    return Inputs(
        source=shape.name,
        ckpt=ckpt,
        policy=parse_policy(POLICY),
        protected=ProtectedList((), (), ""),
        loaded=loaded,
        texts=texts,
        controls=(),
        seed=0,
    )
