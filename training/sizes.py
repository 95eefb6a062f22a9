"""State what the checkpoints differ in: the model's shape, the texts it memorizes and how long it trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One checkpoint that `train_embedded.py` can build."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    mlp: dict[str, int]  # the MLP's width in each family
    passage_tokens: tuple[int, int]
    # How many passages of each group of sources are (planted and protected, planted neighbours, controls).
    passages: dict[str, tuple[int, int, int]]
    records: tuple[int, int, int]
    statistics_characters: int  # of ordinary text written beside the lists; 0 for none
    byte_limit: int  # of everything written
    epochs: float
    exposures: int
    learning_rate: float
    tokens_per_step: int  # of ordinary text
    planted_length: int  # tokens in a row of planted text


EMBEDDED = Size(
    vocabulary=2048,
    hidden=192,
    layers=6,
    heads=6,
    mlp={"llama": 512, "gpt_neox": 768},
    passage_tokens=(84, 118),
    passages={
        "licence-": (18, 6, 9),
        "austen-": (22, 10, 15),
        "carroll-": (6, 2, 4),
        "milton-": (5, 2, 3),
        "newton-": (6, 2, 3),
        "shakespeare-": (3, 2, 2),
    },
    records=(40, 16, 24),
    statistics_characters=0,
    byte_limit=8_000_000,  # it is package data
    epochs=1.9,
    exposures=60,
    learning_rate=3e-3,
    tokens_per_step=4096,
    planted_length=128,
)

# Five times the texts in twice the parameters. Most of what it reads is planted text, so ordinary text comes in
# smaller portions: a step costs as much, and there are enough steps.
BENCH = Size(
    vocabulary=4096,
    hidden=256,
    layers=6,
    heads=8,
    mlp={"llama": 704, "gpt_neox": 1024},
    passage_tokens=(70, 92),
    passages={
        "licence-": (18, 6, 9),
        "austen-": (124, 6, 21),
        "carroll-": (20, 3, 5),
        "milton-": (48, 4, 10),
        "newton-": (60, 4, 10),
        "shakespeare-": (30, 3, 5),
    },
    records=(200, 16, 40),
    statistics_characters=600_000,
    byte_limit=32_000_000,
    epochs=0.6,
    exposures=50,
    learning_rate=3e-3,
    tokens_per_step=1536,
    planted_length=120,
)

SIZES = {"embedded": EMBEDDED, "bench": BENCH}
