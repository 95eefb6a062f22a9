"""Waivers, a section of the policy: which text may break which limit, until when and why; knows no lists and no day."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, StringConstraints

from memscrub.policy.sections import Section

# One line that a terminal shows as it is: neither control characters nor such as turn the direction of writing.
SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+$"
# The limits that a waiver can name, and what findings call them.
WAIVABLE = {
    "max_verbatim_tokens": "max_verbatim_tokens",
    "max_near_verbatim": "max_near_verbatim",
    "max_sampling_probability": "max_sampling_probability",
    "secret": "secrets_emitted",
}


class Waiver(Section):
    """A text that may break its limits for a while, and why; `[[waiver]]` may stand any number of times."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        examples=["poem-17"], description="Id of the protected text."
    )
    limit: Literal["max_verbatim_tokens", "max_near_verbatim", "max_sampling_probability", "secret"] | None = Field(
        default=None,
        examples=["max_near_verbatim"],
        description="The one limit that is waived; without it, all limits of the text's class are.",
    )
    expires: date = Field(
        examples=[date(2026, 12, 31)],
        description="Last day (UTC) on which the waiver counts, as a date without quotes.",
    )
    reason: Annotated[str, StringConstraints(pattern=SHOWN, strip_whitespace=True, max_length=500)] = Field(
        examples=["licensed until the end of the year"],
        description="Why; reports repeat it, so no protected text here.",
    )

    @property
    def finding(self) -> str | None:
        """The limit as findings name it; None: every limit."""
        return None if self.limit is None else WAIVABLE[self.limit]


def _each_once(waivers: tuple[Waiver, ...]) -> tuple[Waiver, ...]:
    seen = set()
    for waiver in waivers:
        if (waiver.id, waiver.limit) in seen:
            raise ValueError(f"names '{waiver.id}' twice with the same limit; keep one of the two")
        seen.add((waiver.id, waiver.limit))
    return waivers


Waivers = Annotated[tuple[Waiver, ...], Strict(False), AfterValidator(_each_once)]
