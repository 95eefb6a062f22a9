"""What takes a protected token's place in a per-text edit, and what such edits are compared with; plain values.

A *distractor* is the token that outbids the protected one. Knows a tokenizer's special tokens, no model and no
text.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from memscrub.errors import CheckpointError, UsageError
from memscrub.storage.untrusted_config import Encoding

MARKER = "[REDACTED]"


class Mode(str, Enum):
    """What takes the place of a protected token; in the order in which an ensemble breaks ties."""

    NEXT_BEST = "next-best"  # the model's best other token at that position
    EOS = "eos"  # the end of the text
    REDACT = "redact"  # the first token of a marker
    SUPPRESS = "suppress"  # nothing: away from the protected token (the change of weights points at that token)


class Baseline(str, Enum):
    """What an edit at the same sites is compared with: is it the edit that works, or any damage there?"""

    ZERO = "zero-ablation"  # the located output vectors are zero
    RANDOM_NEURONS = "random-neurons"  # as many others of the same layers are zero
    RANDOM_DIRECTIONS = "random-directions"  # the located output vectors move as far, but anywhere


def fixed_distractor(tokenizer: Any, mode: Mode, marker: str = MARKER) -> int | None:
    """The token id that this mode always puts in; None where it depends on the position or there is none.

    Raises UsageError when the tokenizer has no such token, CheckpointError when it fails.
    """
    if mode is Mode.EOS:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the mode 'eos' needs an end-of-text token, and this tokenizer has none; use another mode."
            )
        return int(tokenizer.eos_token_id)
    if mode is Mode.REDACT:
        with Encoding():
            ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if not ids or ids[0] == tokenizer.unk_token_id:
            raise UsageError(f"the tokenizer cannot spell the marker '{marker}' of mode 'redact'; choose another one.")
        return int(ids[0])
    return None


def available_modes(tokenizer: Any, marker: str = MARKER) -> tuple[Mode, ...]:
    """The modes that this tokenizer has the tokens for, in order."""
    return tuple(mode for mode in Mode if _available(tokenizer, mode, marker))


def _available(tokenizer: Any, mode: Mode, marker: str) -> bool:
    try:
        fixed_distractor(tokenizer, mode, marker)
    except CheckpointError:  # a tokenizer that fails is another thing than one without the token
        raise
    except UsageError:
        return False
    return True
