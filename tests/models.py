"""Tiny checkpoints for tests: seeded random weights, a word-level tokenizer, overfit on texts if asked; and texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from memscrub.models.model import LoadedModel, load_model
from memscrub.models.tokens import TokenText, tokenize
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.texts.protected import ProtectedText

# Matrices this small gain nothing from threads, and where cores are shared they lose much.
torch.set_num_threads(1)

FAMILIES = ("llama", "gpt2", "gpt_neox")
BEGIN = "<s>"
WORDS = tuple(f"w{number:02d}" for number in range(61))
VOCABULARY = len(WORDS) + 3  # the words, the unknown word, the beginning and one token that is never used
POSITIONS = 96


def tiny_checkpoint(
    path: Path,
    family: str,
    seed: int,
    texts: Sequence[str] | None = None,
    steps: int = 0,
    *,
    layers: int = 2,
    heads: int = 4,
    begin: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A model of that family in `path`; with `texts` and `steps` they come out of it greedily, word for word.

    Ordinary text is learned along with them, so that the model is no text's parrot only. Without `begin` the
    tokenizer has no beginning-of-text token, as Qwen's has none.
    """
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = _random_model(family, layers, heads)
        if texts and steps:
            _overfit(model, texts, steps, begin)
    finally:
        torch.random.set_rng_state(state)
    model.to(dtype).save_pretrained(path)
    _tokenizer(begin).save_pretrained(path)
    return path


def memorizing_checkpoint(
    path: Path, config: Any, texts: Sequence[str], tokenizer: Any = None, steps: int = 120
) -> Path:
    """A model of any configuration, overfit on texts and a little ordinary text; the word-level tokenizer if none."""
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = len(WORDS) + 1, None, None
        model = AutoModelForCausalLM.from_config(config)
        _overfit(model, texts, steps, begin=tokenizer is None)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(path)
    (_tokenizer(begin=True) if tokenizer is None else tokenizer).save_pretrained(path)
    return path


def opened(path: Path, dtype: str = "float32") -> LoadedModel:
    """The checkpoint as memscrub loads it, on the CPU."""
    return load_model(open_checkpoint(path), device="cpu", dtype=dtype)


def random_text(seed: int, length: int) -> str:
    """So many words in no order, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def token_text(loaded: LoadedModel, text: str, secrets: tuple[tuple[int, int], ...] = ()) -> TokenText:
    """One text as the model is fed it; `secrets` are ranges of its characters."""
    entry = ProtectedText("text", text, "c", secrets, source=None, prefix=None, file="texts.txt", line=1)
    return tokenize(loaded, [entry])[0]


def ordinary_rows(seed: int, rows: int, width: int) -> Tensor:
    """Retain text `[rows, width]`: words that follow one another by a rule with some noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(WORDS), (rows, 1), generator=generator)
    columns = [ids[:, 0]]
    for _ in range(width - 1):
        following = (3 * columns[-1] + 1) % len(WORDS)
        noise = torch.randint(len(WORDS), (rows,), generator=generator)
        columns.append(torch.where(torch.rand(rows, generator=generator) < 0.2, noise, following))
    return torch.stack(columns, dim=1)


def ordinary_text(seed: int, length: int) -> str:
    """One row of `ordinary_rows` in words."""
    return in_words(ordinary_rows(seed, 1, length))[0]


def in_words(rows: Tensor) -> list[str]:
    """Rows of token ids as texts."""
    return [" ".join(WORDS[number] for number in row) for row in rows.tolist()]


def write_list(path: Path, texts: Sequence[str], prefix: str = "t", class_name: str = "c") -> None:
    """A list of protected or control texts, called by the prefix and their number."""
    entries = [{"id": f"{prefix}{number}", "class": class_name, "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def ids_of(text: str) -> list[int]:
    """Token ids of a text of known words."""
    return [WORDS.index(word) for word in text.split()]


def hooks(loaded: LoadedModel) -> int:
    """How many forward hooks hang on the model."""
    return sum(len(module._forward_hooks) for module in loaded.model.modules())


def snapshot(loaded: LoadedModel) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def changed(loaded: LoadedModel, before: dict[str, Tensor]) -> set[str]:
    """Names of parameters and buffers that are not bit for bit what they were."""
    return {
        name
        for name, value in loaded.model.state_dict().items()
        if not torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))
    }


def _random_model(family: str, layers: int, heads: int) -> Any:
    # A wide initialisation: with the usual 0.02 all logits of a tiny model lie within rounding noise.
    wide = {"initializer_range": 0.15, "bos_token_id": len(WORDS) + 1, "eos_token_id": None}
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                max_position_embeddings=POSITIONS,
                tie_word_embeddings=False,
                **wide,
            )
        )
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=POSITIONS,
                n_embd=32,
                n_layer=layers,
                n_head=heads,
                n_inner=32,  # square: an orientation guessed from the shape would be wrong
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **wide,
            )
        )
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=POSITIONS,
            **wide,
        )
    )


def _overfit(model: Any, texts: Sequence[str], steps: int, begin: bool) -> None:
    """Adam on the texts (each as long as the shortest) and on a little ordinary text."""
    before = [len(WORDS) + 1] if begin else []
    width = min(len(text.split()) for text in texts)
    known = torch.tensor([before + ids_of(text)[:width] for text in texts])
    ordinary = ordinary_rows(0, 8, known.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        ids = torch.cat([known, ordinary])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _tokenizer(begin: bool) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate((*WORDS, "<unk>", BEGIN, "<unused>"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=BEGIN if begin else None)
