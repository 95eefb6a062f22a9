"""Parts of a report on classes in figures and on the measures that no limit applies to; plain values.

Knows no JSON and not how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RateRecord:
    """`hits` of `count`, and the 95% Wilson interval of that rate."""

    hits: int
    count: int
    low: float
    high: float


@dataclass(frozen=True)
class LeakRecord:
    """What `samples` samples of each text give away: the expected number of texts (one window each, the likeliest) with
    its 95% bootstrap interval over texts, and how many texts come out with probability 0.1, 0.5 and 0.9 or more."""

    samples: int
    expected: float
    low: float
    high: float
    discoverable: tuple[int, ...]


@dataclass(frozen=True)
class ControlLimitRecord:
    """How one limit stands to texts never trained on: how many of them break it, whether that is too many for the
    limit to say much (`flagged`), and how many protected texts break it without passing the `highest` control."""

    limit: str
    allowed: float
    rate: RateRecord
    highest: float | None
    flagged: bool
    unattributed: int


@dataclass(frozen=True)
class ClassRecord:
    """A class in figures, from the latest measures of its texts; `extractable` is None where no text is long enough.

    `confirmed`: texts whose verdict was within rounding noise and decided by real decoding.
    """

    name: str
    violated: RateRecord
    extractable: RateRecord | None
    confirmed: int
    leaks: tuple[LeakRecord, ...]
    controls: tuple[ControlLimitRecord, ...]


@dataclass(frozen=True)
class ExposureRecord:
    """One secret against other values of its shape; see `memscrub.measures.exposure.Exposure`."""

    begin: int
    end: int
    kind: str
    bits: float
    at_least: bool
    space_bits: float
    candidates: int
    complete: bool
    rank: int
    top_k_reach: int
    extrapolated_bits: float | None


@dataclass(frozen=True)
class AlignmentRecord:
    """The model's closest own continuation, over offsets and prefix lengths: similarities, longest common pieces and
    the share of the truth in blocks said in order, each at its highest."""

    token_similarity: float
    character_similarity: float
    common_tokens: int
    common_characters: int
    covered: float


@dataclass(frozen=True)
class DepthRecord:
    """The measures of one text that only `[probe] also` asks for; None where not asked for or the text is too short.

    `shortest_prefix` extracts the text's end, standing alone; `shortest_opening` extracts what follows the text's
    first tokens. `near_mass`: natural logarithms of a lower and an upper bound on the probability of a near-verbatim
    continuation.
    """

    id: str
    class_name: str
    negative_loss: float | None = None
    negative_zlib_ratio: float | None = None
    min_k_plus_plus: float | None = None
    shortest_prefix: int | None = None
    shortest_opening: int | None = None
    exposures: tuple[ExposureRecord, ...] = ()
    near_mass: tuple[float, ...] | None = None
    alignment: AlignmentRecord | None = None


@dataclass(frozen=True)
class SeparationRecord:
    """How well a membership signal tells a class's texts from its controls: AUC and 95% interval."""

    class_name: str
    signal: str
    auc: float
    low: float
    high: float


@dataclass(frozen=True)
class PrefixRecord:
    """Of a class's texts that a prefix of so many tokens fits, how many it extracts. `variant`: "before_suffix" (the
    tokens right before the text's end, standing alone) or "from_start" (the text's own first tokens)."""

    class_name: str
    variant: str
    prefix: int
    rate: RateRecord


@dataclass(frozen=True)
class DepthsRecord:
    """What `[probe] also` asked for: which measures, text by text, and the classes' figures from them."""

    measures: tuple[str, ...]
    texts: tuple[DepthRecord, ...]
    separations: tuple[SeparationRecord, ...] = ()
    prefixes: tuple[PrefixRecord, ...] = ()


@dataclass(frozen=True)
class BasisRecord:
    """What the measures rest on beside the weights: SHA-256 of the settings that decide what is measured, and digests
    of the protected and the control list under the policy's report key (None without a key)."""

    settings_sha256: str
    protected_hmac_sha256: str | None
    controls_hmac_sha256: str | None


@dataclass(frozen=True)
class TrustRecord:
    """The signed report that a gate took the measures from instead of measuring again, and the key that signed it."""

    kind: str
    created: str
    memscrub: str
    policy_sha256: str
    report_sha256: str
    key_id: str


@dataclass(frozen=True)
class WaiverRecord:
    """A waiver of the policy; `limit` None: all limits. `state`: "used", "unused" or "expired"."""

    id: str
    limit: str | None
    expires: str  # ISO 8601, the last day on which it counts
    reason: str
    state: str


@dataclass(frozen=True)
class ExcuseRecord:
    """A limit that a text breaks and that is not held against the run; `by`: "waiver", "baseline" or "rate"."""

    limit: str
    by: str


@dataclass(frozen=True)
class BaselineRecord:
    """The earlier report that only regressions were held against.

    `same_list`: whether it was made with the same protected list; None where the digests do not tell. `tolerance`: the
    share by which a measure may be above the earlier one. `regressions` and `known`: texts that break limits, worse or
    no worse than then; `new_texts`: texts that it does not know.
    """

    sha256: str
    created: str
    policy_sha256: str
    same_list: bool | None
    tolerance: float
    regressions: int
    known: int
    new_texts: int


@dataclass(frozen=True)
class ExpertsRecord:
    """The routed experts of one layer: how many there are, which were edited, and which had to stay as they are because
    no token of the retain text came to them, so that nothing is known of what an edit there costs."""

    layer: int
    experts: int
    edited: tuple[int, ...]
    closed: tuple[int, ...]
