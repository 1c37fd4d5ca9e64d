"""What every store promises, as tests. A store passes when a class like this is green:

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self, clock: Clock, tmp_path: Path) -> Iterator[Store]:
            self.path = tmp_path / "runs"
            self.open = lambda: MyStore(self.path, clock=clock)
            store = self.open()
            yield store
            store.close()

        def reopen(self, store: Store) -> Store:  # only for a store that outlives its process
            store.close()
            return self.open()

        def connect(self, store: Store) -> Any:  # only for a store with transactions: a caller's own connection
            return sqlite3.connect(self.path)

Each test's name is a promise of `perdure.stores.contract`; its story is told with the helpers of `story.py`.
The clock is the test's own and stands still unless told: no test sleeps.
"""

from __future__ import annotations

import pytest

PARTS = "claims mail pruning reading starts transactions turns workers"
# Before these are imported: a failing promise shall show the values it compared.
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in PARTS.split()))

from perdure.stores.contract import Store  # noqa: E402
from perdure.testing.conformance.claims import ClaimPromises  # noqa: E402
from perdure.testing.conformance.mail import MailPromises  # noqa: E402
from perdure.testing.conformance.pruning import PruningPromises  # noqa: E402
from perdure.testing.conformance.reading import ReadingPromises  # noqa: E402
from perdure.testing.conformance.starts import StartPromises  # noqa: E402
from perdure.testing.conformance.story import Clock  # noqa: E402
from perdure.testing.conformance.transactions import TransactionPromises  # noqa: E402
from perdure.testing.conformance.turns import TurnPromises  # noqa: E402
from perdure.testing.conformance.workers import WorkerPromises  # noqa: E402

__all__ = ["Clock", "StoreConformance"]


class StoreConformance(
    StartPromises,
    MailPromises,
    TurnPromises,
    ClaimPromises,
    WorkerPromises,
    ReadingPromises,
    TransactionPromises,
    PruningPromises,
):
    """All promises. Override `store`; `reopen` if it outlives its process, `connect` if it has transactions."""

    @pytest.fixture
    def clock(self) -> Clock:
        """The store's clock, to be handed to its constructor."""
        return Clock()

    @pytest.fixture
    def store(self, clock: Clock) -> Store:
        """A new, empty store on this clock."""
        raise NotImplementedError("give your store in a fixture called `store`")
