"""Find the runs of tokens that two texts share, by hashing every run of a given length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def ngram_hashes(tokens: Tokens, length: int) -> Hashes:
    """Return a 64-bit hash of every run of `length` tokens."""
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), length)
    weights = np.random.default_rng(length).integers(1, 2**63, size=length, dtype=np.uint64) | np.uint64(1)
    mixed = (windows * weights).sum(axis=1, dtype=np.uint64)
    hashes: Hashes = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return hashes


def repeated_ngrams(documents: Iterable[Tokens], length: int) -> Hashes:
    """Return the hashes that occur more than once, in one document or in several, sorted."""
    everything = np.concatenate([ngram_hashes(tokens, length) for tokens in documents])
    hashes, counts = np.unique(everything, return_counts=True)
    repeated: Hashes = hashes[counts > 1]
    return repeated


def shares(tokens: Tokens, hashes: Hashes, length: int) -> bool:
    """Say whether any n-gram of `tokens` is among the sorted `hashes`."""
    if len(hashes) == 0:
        return False
    own = ngram_hashes(tokens, length)
    places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
    return bool((hashes[places] == own).any())
