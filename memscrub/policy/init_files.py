"""What `memscrub init` lays out: a shipped policy, example or proposed texts, a retain sample; knows no command line
and not how texts are proposed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from memscrub.errors import OutputError, UsageError
from memscrub.policy.document import parse_policy
from memscrub.policy.mistakes import did_you_mean

# `demo` is left out: it names the files of the embedded checkpoint, not texts of the user's own.
STARTERS = ("release-gate", "pii-strict", "copyright")
PROTECTED = "protected.jsonl"

# Class, text and secret of texts that are nobody's: reserved telephone numbers, test cards, example domains.
_EXAMPLES: tuple[tuple[str, str, str | None], ...] = (
    (
        "pii",
        "Customer record 10001: Ada Example, 1 Example Street, phone +1 202-555-0143.",
        "+1 202-555-0143",
    ),
    (
        "copyright",
        "EXAMPLE, replace it: The lighthouse at Nowhere Point was built by a man who disliked the sea, and"
        " who said so in each of the four hundred letters that he wrote to the harbour board in his time.",
        None,
    ),
    (
        "pii",
        "Invoice for Max Mustermann, max@mustermann.example, card 4111 1111 1111 1111.",
        "4111 1111 1111 1111",
    ),
    ("pii", "Password reset for user jdoe at shop.example: correct-horse-battery.", "correct-horse-battery"),
    (
        "copyright",
        "EXAMPLE, replace it: Every morning the clockmaker wound eleven clocks and listened to the twelfth,"
        " which he had never dared to open, because it was the only one in the shop never to be wrong.",
        None,
    ),
    (
        "copyright",
        "EXAMPLE, replace it: We drew the map before we saw the country, and when at last we saw it we moved"
        " two rivers, at great expense, so that nobody would have to know how early we had drawn the map.",
        None,
    ),
)

_RETAIN = """\
Replace these paragraphs by ordinary text like that which your model works with: a few hundred paragraphs,
separated by blank lines, and none of them protected. Half of them tell the solver what to leave alone.

The other half is kept from the solver and measures what the edit changed. It matters less whether the model
was trained on these texts than that they are the kind of text it will meet.

A harbour town wakes early. The boats go out before light, the bakery opens at five, and by the time the
school bell rings the market on the quay has already been swept and put away.

To prepare the dough, mix flour, water and salt, and let it rest for an hour. Fold it twice, shape it into a
round loaf, and bake it in a hot oven until the crust is brown and sounds hollow.
"""


def policies_folder() -> Path:
    """Where the shipped policies are: inside an installed package, or at the top of a source tree."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "policies"
    return inside if inside.is_dir() else package.parent / "policies"


def check_starter(
    directory: str | os.PathLike[str], policy_name: str = "release-gate", class_name: str | None = None
) -> None:
    """Raise what `write_starter` would raise, before time is spent on proposals for the protected list.

    `class_name` is the class that the proposals will be of; UsageError where the policy has no such class.
    """
    _contents(Path(directory), policy_name, class_name, None)


def write_starter(
    directory: str | os.PathLike[str],
    policy_name: str = "release-gate",
    *,
    proposed: str | None = None,
    class_name: str | None = None,
) -> list[Path]:
    """Write the policy, `protected.jsonl` and `retain.txt` into a directory; the policy is first in the list.

    Writes all three or, where one of them exists or cannot be written, none. `proposed` are lines of a protected list
    that take the place of the examples, of the class `class_name`; they are somebody's real data, so that file can be
    read by its owner alone (mode 0600).
    """
    folder = Path(directory)
    contents = _contents(folder, policy_name, class_name, proposed)
    _write_all(folder, contents, private=() if proposed is None else (folder / PROTECTED,))
    return list(contents)


def _contents(folder: Path, policy_name: str, class_name: str | None, proposed: str | None) -> dict[Path, bytes]:
    """What the files will hold, after a look that none of them is there."""
    if policy_name not in STARTERS:
        hint = did_you_mean(policy_name, STARTERS, f"there are {', '.join(STARTERS)}.")
        raise UsageError(f"There is no policy '{policy_name}' to start from; {hint}")
    policy = (policies_folder() / f"{policy_name}.toml").read_bytes()
    classes = parse_policy(policy, Path(f"{policy_name}.toml")).classes
    if class_name is not None and class_name not in classes:
        raise UsageError(
            f"The policy '{policy_name}' has no class '{class_name}' for what is found in a corpus; start from"
            " release-gate or pii-strict."
        )
    contents = {
        folder / f"{policy_name}.toml": policy,
        folder / PROTECTED: (_examples(list(classes)) if proposed is None else proposed).encode("utf-8"),
        folder / "retain.txt": _RETAIN.encode("utf-8"),
    }
    for path in contents:
        if os.path.lexists(path):
            raise OutputError(f"{path}: the file exists already; move it away or choose another directory.")
    return contents


def _examples(classes: list[str]) -> str:
    """Three lines of the classes that the policy knows, with the secrets marked."""
    lines: list[str] = []
    for class_name, text, secret in _EXAMPLES:
        if class_name not in classes:
            continue
        line: dict[str, object] = {"id": f"example-{len(lines) + 1}", "class": class_name, "text": text}
        if secret is not None:
            start = text.index(secret)
            line["secret"] = [[start, start + len(secret)]]
        lines.append(json.dumps(line))
    return "\n".join(lines[:3]) + "\n"


def _write_all(folder: Path, contents: dict[Path, bytes], private: Collection[Path]) -> None:
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            mode = 0o600 if path in private else 0o666
            # EXCL: a file that appeared meanwhile is not overwritten either. The mode holds from the first byte on.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with open(handle, "wb") as file:
                file.write(data)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise OutputError(f"{folder}: cannot write there ({error.strerror}); choose another directory.") from None
