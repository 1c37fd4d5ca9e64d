"""The memory store keeps every promise: it is the specification, so it comes first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.testing.conformance import Clock, StoreConformance


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self, clock: Clock) -> Iterator[Store]:
        store = MemoryStore(clock=clock)
        yield store
        store.close()
