"""Is a policy ready for a gate? Reads the policy, its lists and its waivers and counts; knows no model and no tokens.

What ends a gate with exit code 2 is an error here too. So is a waiver that has expired: somebody should look at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from memscrub.errors import PolicyError
from memscrub.policy.document import Policy, load_policy
from memscrub.policy.mistakes import at_line, decode, read_source
from memscrub.policy.toml_lines import line_of
from memscrub.policy.waiver_entries import Waiver
from memscrub.reports.basis import report_key
from memscrub.reports.waivers import allowances_of, check_waivers, today
from memscrub.texts.protected import ProtectedList, ProtectedText, iter_texts, load_controls, load_protected

# Of English text; how many tokens a text has only its model's tokenizer knows.
CHARACTERS_PER_TOKEN = 4
# Texts of so many tokens are too short for a near-verbatim opening, which gives half of them and compares eight.
NO_OPENING = 14
# Days before its end from which on a waiver is worth a remark.
SOON = 30


@dataclass(frozen=True)
class PolicyCheck:
    """What a sound policy holds: texts by class, controls, ids dropped as duplicates, ids that look too short to
    judge (an estimate), the waivers in force, and remarks."""

    policy: Policy
    texts: dict[str, int]
    controls: int
    duplicates: tuple[str, ...]
    short: tuple[str, ...]
    waivers: tuple[Waiver, ...]
    remarks: tuple[str, ...]


def check_policy(path: Path, *, day: date | None = None) -> PolicyCheck:
    """Read everything that a policy names but keys for signing. Raises UsageError and its kinds, PolicyError among
    them where a waiver has expired on `day` (today)."""
    now = today() if day is None else day
    policy = load_policy(path)
    protected, controls = load_protected(policy), load_controls(policy)
    for _ in iter_texts(map(policy.resolve, (*policy.locality.retain, *policy.locality.neighbours))):
        pass
    check_waivers(policy, protected)
    _check_ceilings(policy, controls)
    allowances = allowances_of(policy, day=now)
    if allowances.expired:
        raise PolicyError(_expired(policy, allowances.expired[0]))
    counts = Counter(text.class_name for text in protected)
    short = tuple(text.id for text in protected if _looks_short(policy, text))
    return PolicyCheck(
        policy=policy,
        texts={name: counts[name] for name in policy.classes},
        controls=len(controls),
        duplicates=protected.duplicates,
        short=short,
        waivers=allowances.waivers,
        remarks=(*_remarks(policy, protected, short, now), *_of_controls(policy, controls)),
    )


def _check_ceilings(policy: Policy, controls: ProtectedList) -> None:
    present = {text.class_name for text in controls}
    for name, limits in policy.classes.items():
        if limits.like_controls and name not in present:
            message = f"class {name} sets like_controls, but there is no control text of that class; add some."
            raise PolicyError(f"{policy.path}: {message}")


def _of_controls(policy: Policy, controls: ProtectedList) -> Iterator[str]:
    """Classes whose controls may be too short to set their limits; only a scan knows, and refuses such a policy."""
    for name, limits in policy.classes.items():
        lengths = [len(text.text) for text in controls if text.class_name == name]
        window = 0 if limits.secret else limits.max_verbatim_tokens or 0
        if limits.like_controls and lengths and max(lengths) / CHARACTERS_PER_TOKEN <= max(NO_OPENING, window):
            yield f"all control texts of class {name} are perhaps too short for like_controls"


def _expired(policy: Policy, waiver: Waiver) -> str:
    index = policy.waivers.index(waiver)
    line = line_of(decode(read_source(policy.path), policy.path), ("waiver", index, "expires"))
    message = f"the waiver of '{waiver.id}' expired on {waiver.expires}; renew it with a new reason, or remove it."
    return at_line(policy.path, line, message)


def _looks_short(policy: Policy, text: ProtectedText) -> bool:
    limits = policy.classes[text.class_name]
    too_few = 0 if limits.max_verbatim_tokens is None else limits.max_verbatim_tokens + policy.probe.min_prefix_tokens
    if limits.max_near_verbatim is not None:
        too_few = max(too_few, NO_OPENING)
    return len(text.text) / CHARACTERS_PER_TOKEN <= too_few


def _remarks(policy: Policy, protected: ProtectedList, short: tuple[str, ...], day: date) -> Iterator[str]:
    counts = Counter(text.class_name for text in protected)
    for name in policy.classes:
        if not counts[name]:
            yield f"class {name} has no texts"
        rate = allowances_of(policy, day=day).rates.get(name)
        count, needed = counts[name], 0 if rate is None else rate.texts_needed
        if 0 < count < needed:
            some = f"{count} text{'s' * (count > 1)}"
            yield f"class {name} has {some}, and max_violation_rate cannot hold with fewer than {needed}"
    if protected.duplicates:
        yield f"{_many(protected.duplicates)} dropped as duplicates"
    if short:
        yield f"{_many(short)} perhaps too short to judge (at {CHARACTERS_PER_TOKEN} characters a token)"
    for waiver in policy.waivers:
        if (left := (waiver.expires - day).days) <= SOON:
            yield f"the waiver of '{waiver.id}' expires in {left} days"
    if policy.report.key is None:
        yield "no [report] key: a gate cannot trust signed measures and will always measure"
    elif policy.resolve(policy.report.key).is_file():
        report_key(policy)
    else:
        yield f"the [report] key {policy.report.key} is not here, and a gate needs it"


def _many(ids: tuple[str, ...]) -> str:
    return f"{len(ids)} texts (the first is '{ids[0]}')" if len(ids) > 1 else f"1 text ('{ids[0]}')"
