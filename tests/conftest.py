"""The order of the tests: the longest begin first, so that processes that share the tests end together."""

from __future__ import annotations

import pytest

LONGEST = "test_main_job.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the file with tests of a minute and more to the front; the order is otherwise as it was."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model this tiny is full: here it is what an edit reaches that counts, whatever it costs."""
    monkeypatch.setattr("memscrub.reports.locality_limits.CATASTROPHIC_AGREEMENT", 0.0)
    monkeypatch.setattr("memscrub.reports.locality_limits.CATASTROPHIC_PERPLEXITY_RATIO", 1e9)
