"""What was measured of each text, as far as a run has got: numbers only, never texts or tokens; knows no file.

`measure` asks it what need not be measured again and tells it what is new; a journal fills it and listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from memscrub.reports.judgement import Measures

Listen = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Noted:
    """What the teacher-forced pass said of a text: its measures, the offsets at which its own continuation has to be
    decoded, and the upper estimate for its other openings (None without any)."""

    measures: Measures
    asked: tuple[int, ...] = ()
    estimate: float | None = None


_NOTED = TypeAdapter(tuple[int, Noted])
_SIMILAR = TypeAdapter(list[tuple[int, int, float]])


@dataclass
class Remembered:
    """The texts of one list by index: what the pass said, and similarities of continuations by (text, offset).

    `listen` is told, as plain values for JSON, of everything that is new; `take` reads them back.
    """

    listen: Listen = lambda values: None
    texts: dict[int, Noted] = field(default_factory=dict)
    similar: dict[tuple[int, int], float] = field(default_factory=dict)

    def note(self, index: int, noted: Noted) -> None:
        """What the pass said of a text."""
        self.texts[index] = noted
        self.listen({"noted": [index, asdict(noted)]})

    def heard(self, similar: Mapping[tuple[int, int], float]) -> None:
        """Similarities of the continuations of one batch."""
        self.similar.update(similar)
        self.listen({"similar": [[*opening, value] for opening, value in similar.items()]})

    def take(self, values: Mapping[str, Any]) -> None:
        """What `listen` was once told. Raises ValueError or KeyError for anything else."""
        if "similar" in values:
            self.similar.update(
                {(text, offset): each for text, offset, each in _SIMILAR.validate_python(values["similar"])}
            )
        else:
            index, noted = _NOTED.validate_python(values["noted"])
            self.texts[index] = noted
