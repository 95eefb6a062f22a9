"""The sections of a policy and their settings, each described once; knows neither files nor messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StringConstraints,
    model_validator,
)

# A list in TOML becomes a tuple, so a frozen policy cannot change through its lists; its items stay strict.
FileName = Annotated[str, StringConstraints(min_length=1)]
Files = Annotated[tuple[FileName, ...], Strict(False)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("lists a number twice; keep each number once")
    return tuple(sorted(values))


Layers: TypeAlias = Literal["auto", "all"] | tuple[int, ...]


def _layers(value: Any) -> Layers:
    # By hand, because a pydantic union would report one error per alternative.
    if isinstance(value, str) and value in ("auto", "all"):
        return "auto" if value == "auto" else "all"
    if not isinstance(value, list | tuple) or not value or any(type(item) is not int or item < 0 for item in value):
        raise ValueError('must be "auto", "all" or a list of layer numbers from 0; for example layers = [2, 3, 4]')
    return _distinct(tuple(value))


Also = Literal["membership", "prefix-sweep", "exposure", "near-mass", "alignment"]


class Section(BaseModel):
    """A section that refuses unknown keys, converts nothing and cannot be changed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class ProtectedFiles(Section):
    """Where the texts are that must not come out."""

    files: Files = Field(
        min_length=1,
        examples=[["protected.jsonl"]],
        description="Lists of protected texts, relative to the policy.",
    )
    controls: Files = Field(
        default=(),
        examples=[["control.jsonl"]],
        description="Lists of texts of the same shape, never trained on: they tell guessing from memory.",
    )


class ClassLimits(Section):
    """What a class of protected texts may give away at most; at least one limit, or `secret = true`."""

    max_verbatim_tokens: Count | None = Field(
        default=None,
        examples=[16],
        description="Longest run of tokens that greedy decoding may reproduce, from any offset.",
    )
    max_near_verbatim: Share | None = Field(
        default=None,
        examples=[0.6],
        description="Highest similarity (0 to 1) that the model's own continuation may have to the true one.",
    )
    max_sampling_probability: Share | None = Field(
        default=None,
        examples=[1e-4],
        description="Highest probability of sampling `max_verbatim_tokens` tokens running or a whole secret.",
    )
    like_controls: bool = Field(
        default=False,
        description="Go on until continuations are no closer to the texts, and texts no likelier under sampling,"
        " than those of the control texts are.",
    )
    secret: bool = Field(
        default=False, description="Judge the marked `secret` spans: greedy decoding must not emit one whole."
    )
    top_k: Count = Field(default=40, description="Sampling is from this many likeliest tokens.")
    top_p: Share = Field(
        default=1.0, description="Of those, sampling is from the likeliest that together have this probability."
    )
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature.")
    max_violation_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        examples=[0.01],
        description="Share of texts that may break a limit: the class passes when the upper confidence bound of that"
        " share is no higher. Without it every text counts.",
    )
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="Confidence of that bound (one-sided, Clopper-Pearson)."
    )

    @model_validator(mode="after")
    def _has_limits_that_can_be_judged(self) -> ClassLimits:
        limits = (self.max_verbatim_tokens, self.max_near_verbatim, self.max_sampling_probability)
        if not self.secret and all(limit is None for limit in limits):
            raise ValueError("sets no limit; add for example max_verbatim_tokens = 16, or secret = true")
        if self.max_sampling_probability is not None and not self.secret and self.max_verbatim_tokens is None:
            raise ValueError(
                "sets max_sampling_probability without the length of the window it is about;"
                " add for example max_verbatim_tokens = 16, or secret = true"
            )
        if "confidence" in self.model_fields_set and self.max_violation_rate is None:
            raise ValueError("sets confidence without the rate it is about; add for example max_violation_rate = 0.01")
        return self


class Probe(Section):
    """How the model is asked."""

    prefix_tokens: Count = Field(default=50, description="Discoverable extraction: tokens of true text that are given.")
    suffix_tokens: Count = Field(default=50, description="Discoverable extraction: tokens that must follow exactly.")
    near_verbatim_prefix: Count = Field(default=32, description="Near-verbatim: tokens of true text that are given.")
    near_verbatim_tokens: Count = Field(default=48, description="Near-verbatim: tokens of own continuation compared.")
    offsets: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1), AfterValidator(_distinct)
    ] = Field(default=(0, 8, 16), description="Near-verbatim: where in the text the given prefix starts, in tokens.")
    min_prefix_tokens: Count = Field(
        default=1, description="Positions before this many tokens of the text are not judged."
    )
    screen: bool = Field(
        default=False,
        description="`scan` decodes for `max_near_verbatim` only where the forward pass shows that a text could come"
        " near it; an estimate that texts differing in case or spacing can evade. `gate` and `fix` never do this.",
    )
    also: Annotated[tuple[Also, ...], Strict(False)] = Field(
        default=(),
        examples=[["membership", "exposure"]],
        description="More measures for `scan` and `gate` to report; no limit applies: `membership` signals,"
        " `prefix-sweep`, `exposure` of secrets, `near-mass` (probability of a near-verbatim sample), `alignment`.",
    )
    batch_tokens: Count = Field(default=8192, description="Tokens per forward pass; less needs less memory.")


class Locality(Section):
    """How much of everything else may change; measured on retain texts the solver never saw."""

    retain: Files = Field(
        default=(),
        examples=[["retain.txt"]],
        description="Ordinary texts the model should go on as before; needed by `fix`.",
    )
    statistics: Files = Field(
        default=(),
        examples=[["statistics.txt"]],
        description="More ordinary text for the solver only, never measured on.",
    )
    neighbours: Files = Field(
        default=(),
        examples=[["neighbours.jsonl"]],
        description="Texts close to the protected ones that must still work.",
    )
    max_kl: float = Field(
        default=0.01, gt=0, description="Mean KL divergence of the edited from the original model, nats."
    )
    max_worst_kl: Positive | None = Field(
        default=None,
        examples=[0.1],
        description="The same for the worst row of 256 tokens; reported with and without a limit.",
    )
    max_perplexity_ratio: float = Field(default=1.01, ge=1, description="Perplexity after the edit over that before.")
    min_agreement: Share = Field(
        default=0.95, description="Share of positions where the likeliest token stays the same."
    )
    min_neighbours_kept: Share | None = Field(
        default=None,
        examples=[0.95],
        description="Share of the tokens known in `neighbours` before that must still be known.",
    )
    max_degenerate: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Benign prompts, as a share, that may end early or degenerate beyond those that did before.",
    )
    utility: Files = Field(
        default=(),
        examples=[["hellaswag"]],
        description="Tasks of lm-eval, or YAML files of tasks, run before and after (`memscrub[lm-eval]`); no limit.",
    )
    max_tokens: Count = Field(
        default=200_000,
        description="Tokens read at most for each half of the retain text: one solves, one measures.",
    )

    @model_validator(mode="after")
    def _limits_what_is_measured(self) -> Locality:
        if self.min_neighbours_kept is not None and not self.neighbours:
            raise ValueError('sets min_neighbours_kept but names no neighbours; add neighbours = ["neighbours.jsonl"]')
        return self


class Fix(Section):
    """How the model is edited."""

    mode: Literal["next-best", "eos", "redact", "suppress", "ensemble"] = Field(
        default="next-best",
        description="What takes the place of a protected token: the model's own next best token, the end of text,"
        " a marker, nothing in particular; `ensemble` chooses for each text what disturbs least.",
    )
    marker: Annotated[str, StringConstraints(min_length=1)] = Field(
        default="[REDACTED]", description="Mode `redact`: the text whose first token takes the place."
    )
    solver: Literal["joint", "per-text"] = Field(
        default="joint",
        description="`joint` solves for all texts at once; `per-text` edits a few neurons per text, one text after"
        " the other.",
    )
    neurons: Count = Field(default=5, description="Solver `per-text`: neurons edited per token.")
    rank: Count = Field(
        default=50, description="Solver `per-text`: neurons count whose vector ranks the token among so many."
    )
    fallback: Literal["attention", "none"] = Field(
        default="attention", description='With sites = "mlp": what to try on texts that editing these does not reach.'
    )
    sites: Literal["mlp", "mlp+attention", "mlp+attention+queries"] = Field(
        default="mlp+attention+queries",
        description="What may be edited: the output projections of the MLPs (the paper's), those of the attention"
        " too, or the attention's query projections as well.",
    )
    contexts: Annotated[
        tuple[Literal["start", "unrelated", "follows", "perturbed"], ...], Strict(False), Field(min_length=1)
    ] = Field(
        default=("start",),
        examples=[["start", "follows", "unrelated"]],
        description="Where texts must hold: at the `start` of a prompt, behind `unrelated` ordinary text, where a"
        " text `follows` another and an end-of-text token, and with `perturbed` first tokens.",
    )
    margin: float = Field(default=0.3, gt=0, description="Logits by which the other token must win.")
    rounds: Annotated[int, Field(ge=1, le=100)] = Field(default=20, description="Solve and measure at most this often.")
    layers: Annotated[Layers, PlainValidator(_layers)] = Field(
        default="auto",
        examples=[[2, 3, 4], "all"],
        description='The layer numbers that may be edited, or `"all"`. `"auto"` is the upper half where classes limit'
        " greedy runs and secrets alone; all layers where a class has `max_near_verbatim`,"
        " `max_sampling_probability` or `like_controls`, where there are fewer than six, and for `per-text`.",
    )

    @property
    def named_layers(self) -> tuple[int, ...] | None:
        """The layers that are named by their numbers; None where they are not."""
        return self.layers if isinstance(self.layers, tuple) else None


class ReportSettings(Section):
    """What reports may show."""

    key: FileName | None = Field(
        default=None,
        examples=["report.key"],
        description="File with a secret of 16 bytes or more that keys the digest of the protected list in reports;"
        " without it, reports carry no digest of the list.",
    )


class Sign(Section):
    """How the result is signed."""

    key: FileName | None = Field(
        default=None,
        examples=["signing-key.pem"],
        description="Private key (PEM) that signs, relative to the policy; or `sigstore`, to sign with an identity.",
    )
    key_id: Annotated[str, StringConstraints(pattern=r"^(sha256:)?[0-9a-f]{64}$")] | None = Field(
        default=None,
        examples=["sha256:" + "0" * 64],
        description="The one key that counts, by its id as `memscrub keygen` shows it: `fix` signs with no other, and"
        " `gate --key` believes no other.",
    )
