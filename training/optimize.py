"""Train a small causal language model on the ordinary text, showing it every planted text many times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ngrams import Tokens
from sizes import Size
from texts import CONTEXT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

BOS = 0  # <|endoftext|>, which both begins and ends a document
IGNORED = -100
Batch = tuple[Tensor, Tensor]  # token ids, and the same with IGNORED where no loss is wanted


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: float  # passes over the ordinary text
    exposures: int  # rounds through the planted texts, spread evenly over the whole training
    learning_rate: float
    seed: int
    tokens_per_step: int  # of ordinary text
    planted_length: int
    long_share: float = 0.12  # the last part of the ordinary text comes in rows of the full context
    warmup_steps: int = 100
    weight_decay: float = 0.05


def configuration(family: str, size: Size) -> PretrainedConfig:
    """Return the configuration of a model of the given size."""
    shape: dict[str, object] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp[family],
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": BOS,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        return LlamaConfig.from_dict(shape | {"num_key_value_heads": size.heads // 2})
    return GPTNeoXConfig.from_dict(shape)


def stream_batches(documents: Sequence[Tokens], length: int, rows: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Pack shuffled documents, each begun by BOS, into rows of `length` tokens; never ends."""
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([np.concatenate(([BOS], documents[index])) for index in order])
        whole = len(stream) // (rows * length) * rows * length
        for batch in stream[:whole].reshape(-1, rows, length):
            ids = torch.from_numpy(batch)
            yield ids, ids


def planted_batches(texts: Sequence[Tokens], length: int, rows: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Give the planted texts in shuffled rounds, each alone in its row as BOS + text + BOS; never ends."""
    queue: list[int] = []
    while True:
        ids = np.full((rows, length), BOS, dtype=np.int64)
        labels = np.full((rows, length), IGNORED, dtype=np.int64)
        for row in range(rows):
            if not queue:
                queue = rng.permutation(len(texts)).tolist()
            text = texts[queue.pop()]
            ids[row, 1 : len(text) + 1] = text
            labels[row, : len(text) + 2] = ids[row, : len(text) + 2]
        yield torch.from_numpy(ids), torch.from_numpy(labels)


def summed_loss(model: Callable[..., object], batch: Batch) -> tuple[Tensor, int]:
    """Return the summed loss of the next-token predictions in a batch, and how many they are."""
    ids, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits  # type: ignore[attr-defined]
    targets = labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((targets != IGNORED).sum())


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Warm up linearly, then fall along a cosine to a twentieth of the peak."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(
    config: PretrainedConfig,
    ordinary: Sequence[Tokens],
    planted: Sequence[Tokens],
    schedule: Schedule,
    compiled: bool,
) -> PreTrainedModel:
    """Return a model trained from scratch; the same arguments give the same model on the same machine."""
    torch.manual_seed(schedule.seed)
    rng = np.random.default_rng(schedule.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    optimizer = optimizer_for(model, schedule)
    forward: Callable[..., object] = torch.compile(model, dynamic=False) if compiled else model

    steps = round(schedule.epochs * sum(len(d) + 1 for d in ordinary) / schedule.tokens_per_step)
    long_from = round(steps * (1 - schedule.long_share))
    planted_per_step = max(1, round(schedule.exposures * len(planted) / steps))
    short, full = CONTEXT // 2, CONTEXT
    short_rows = stream_batches(ordinary, short, schedule.tokens_per_step // short, rng)
    full_rows = stream_batches(ordinary, full, schedule.tokens_per_step // full, rng)
    planted_rows = planted_batches(planted, schedule.planted_length, planted_per_step, rng)
    exposures = steps * planted_per_step / len(planted)
    print(f"{steps} steps, {planted_per_step} planted rows in each: {exposures:.1f} rounds")

    started = time.monotonic()
    for step in range(steps):
        ordinary_sum, ordinary_count = summed_loss(forward, next(short_rows if step < long_from else full_rows))
        planted_sum, planted_count = summed_loss(forward, next(planted_rows))
        loss = (ordinary_sum + planted_sum) / (ordinary_count + planted_count)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            losses = f"ordinary {ordinary_sum.item() / ordinary_count:.3f}"
            losses += f" planted {planted_sum.item() / planted_count:.3f}"
            print(f"step {step:5}/{steps} {losses} after {time.monotonic() - started:5.0f} s", flush=True)
    return model
