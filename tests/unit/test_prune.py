"""The batches of `perdure prune`, and a store that cannot be reached between them."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.cli import prune
from perdure.core.errors import StoreUnavailable
from perdure.core.turn import Pruned, Retention

ASKED = Retention(namespace="default", ended_before=1, limit=2)


class Away:
    """A store with five runs that may go; `trouble`: how many of the next calls cannot reach it."""

    def __init__(self, trouble: int) -> None:
        self.trouble = trouble
        self.runs = 5

    def prune(self, retention: Retention) -> Pruned:
        if self.runs < 5 and self.trouble:
            self.trouble -= 1
            raise StoreUnavailable("away", store="memory://")
        gone = min(self.runs, retention.limit)
        self.runs -= gone
        return Pruned(runs=gone, after=self.runs or None)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


def test_a_batch_is_tried_again_while_the_store_is_away_for_a_moment(pauses: list[float]) -> None:
    store: Any = Away(trouble=3)
    done: list[int] = []
    assert prune.pruned(store, ASKED, None, done) == 5
    assert done == [2, 2, 1]
    assert [pause for pause in pauses if pause >= 1] == [1, 2, 3]


def test_what_was_removed_is_known_when_it_stays_away() -> None:
    store: Any = Away(trouble=4)
    done: list[int] = []
    with pytest.raises(StoreUnavailable):
        prune.pruned(store, ASKED, None, done)
    assert done == [2]
