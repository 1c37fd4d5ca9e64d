"""A batch until it has its verdicts: sent at once, sent again where that is right, taken apart where it must be.

Sent again: when the server gave the transaction up because of others (it is gone for certain), and when the connection
was lost (nobody knows; turns, starts and messages are known by their ids, so asking twice writes once).
Taken apart: when the data of an item cannot be stored, which the codec should have known before; and when somebody's
open transaction holds an item up, so that it alone is put off (`held.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import psycopg

from perdure.core.errors import StoreError
from perdure.core.turn import (
    Batch,
    Begun,
    Busy,
    Committed,
    Fenced,
    Kept,
    Send,
    SendVerdict,
    Start,
    StartVerdict,
    Turn,
    TurnVerdict,
    Unstorable,
    Verdict,
)
from perdure.stores.postgres import judging
from perdure.stores.postgres.batch import Call, Outgoing
from perdure.stores.postgres.errors import PACKING_ERRORS, RETRIED, lost, unfit
from perdure.stores.postgres.held import LOCKED, MOST_WAITS, Held
from perdure.stores.postgres.queries import Statement
from perdure.stores.refused import item_refused

TRIES: Final = 10
"""Of a transaction that the server gives up because of others."""
RECONNECTS: Final = (0.0, 0.1, 0.4)
"""Seconds before each new connection, before a batch is given up."""


class Way(Protocol):
    """How transactions reach the server: `writer.Writer`, or `borrowed.Borrowed`."""

    @property
    def own(self) -> bool:
        """Whether a transaction may be tried again here."""

    def begin(self, calls: Sequence[Call]) -> None:
        """Send one transaction."""

    def finish(self) -> list[Any]:
        """The answers to its calls."""

    def probe(self, calls: Sequence[Call]) -> None:
        """Do it and undo it: raises what the server has against it."""

    def ask(self, statement: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows of one statement."""

    def drop(self) -> None:
        """The connection is of no use any more."""


class Sending:
    """See the module. The first transaction is on its way when this is made."""

    def __init__(
        self,
        writer: Way,
        statements: Mapping[str, Statement],
        clock: Callable[[], int],
        batch: Batch,
        url: str,
        held: Held,
    ) -> None:
        self.news = False
        """Whether somebody may wait for what was written."""
        self.wrote = False
        """Whether a part of the batch was written."""
        self.waits = 0
        """How often a part of it has waited for a lock in vain."""
        self._writer = writer
        self._statements = statements
        self._clock = clock
        self._url = url
        self._batch = batch
        self._held = held
        # A second turn of a run can only be judged when the first one is written.
        seen: dict[int, Turn] = {}
        self._later = [turn for turn in batch.turns if seen.setdefault(turn.run, turn) is not turn]
        first = batch
        if self._later:
            first = Batch(starts=batch.starts, sends=batch.sends, turns=list(seen.values()))
        self._put_off: list[Start | Send | Turn] = []
        if held:
            self._put_off = [item for item in _items(first) if held.knows(item)]
            if self._put_off:
                first = _without(first, self._put_off)
        self._try = _Try(self, first)

    def arrived(self) -> bool:
        """Whether the first answers are here; for a `Writer` only."""
        return self._try.arrived()

    def usual(self) -> list[Verdict] | None:
        """The verdicts, if the answers are here and say that all was written; else `finish` finds out what was."""
        if self._later or self._put_off:
            return None
        verdicts = self._try.usual()
        return None if verdicts is None else [*verdicts[0], *verdicts[1], *verdicts[2]]

    def finish(self) -> list[Verdict]:
        """The verdicts, in the order of the batch."""
        verdicts = self._try.all_verdicts()
        if not self._later and not self._put_off:
            return verdicts
        judged = dict(zip(map(id, _items(self._try.batch)), verdicts, strict=True))
        for item in self._put_off:
            judged[id(item)] = self._alone(item) if self._held.may_try() else _busy(item)
        for turn in self._later:
            judged[id(turn)] = self._alone(turn)
        return [judged[id(item)] for item in _items(self._batch)]

    def _alone(self, item: Start | Send | Turn) -> Verdict:
        self._held.remove(item)
        return _Try(self, _batch_of([item])).all_verdicts()[0]


class _Try:
    """One transaction, until it is written; and what its answers mean."""

    def __init__(self, sending: Sending, batch: Batch, *, depth: int = 0) -> None:
        self.batch = batch
        self._sending = sending
        self._depth = depth
        self._failed: Exception | None = None
        self._outgoing: Outgoing | None = None
        self._is_read = False
        self._send()

    def arrived(self) -> bool:
        writer: Any = self._sending._writer
        if self._failed is None:
            try:
                return bool(writer.arrived())
            except psycopg.Error as error:
                self._failed = error
        return True

    def usual(self) -> tuple[list[StartVerdict], list[SendVerdict], list[TurnVerdict]] | None:
        writer: Any = self._sending._writer
        outgoing = self._outgoing
        if self._failed is not None or outgoing is None or writer.failed:
            return None
        outgoing.read(writer.finish())
        self._is_read = True
        batch = self.batch
        whole = (
            (outgoing.begun is not None or not batch.starts)
            and len(outgoing.kept) == len(batch.sends)
            and all(turn.run in outgoing.committed for turn in batch.turns)
        )
        return self.verdicts() if whole else None

    def all_verdicts(self) -> list[Verdict]:
        """In the order of the batch."""
        starts, sends, turns = self.verdicts()
        return [*starts, *sends, *turns]

    def verdicts(self) -> tuple[list[StartVerdict], list[SendVerdict], list[TurnVerdict]]:
        try:
            outgoing = self._written()
        except PACKING_ERRORS as error:
            return self._apart(error)
        except psycopg.Error as error:
            if error.sqlstate == LOCKED and self._sending._writer.own:
                return self._held_up(error)
            if not unfit(error):
                raise
            return self._apart(error)
        self._sending.news = self._sending.news or outgoing.news
        self._sending.wrote = True
        return self._starts(outgoing), self._sends(outgoing), self._turns(outgoing)

    # --- sending it until it is written

    def _send(self) -> None:
        """Send it; what goes wrong is looked at when the answers are."""
        self._failed = None
        sending = self._sending
        try:
            self._outgoing = Outgoing(self.batch, sending._clock(), sending._statements)
            sending._writer.begin(self._outgoing.calls)
        except (psycopg.Error, *PACKING_ERRORS) as error:
            self._failed = error

    def _written(self) -> Outgoing:
        tries = 0
        reconnects = iter(RECONNECTS)
        while True:
            try:
                if self._failed is not None:
                    raise self._failed
                outgoing = self._outgoing
                assert outgoing is not None
                if not self._is_read:
                    outgoing.read(self._sending._writer.finish())
                self._is_read = False
                return outgoing
            except psycopg.Error as error:
                if not self._sending._writer.own:
                    raise
                if error.sqlstate in RETRIED and tries < TRIES:
                    # 2 ms doubling to a second, spread: whoever collided does not collide again.
                    pause = random.uniform(0.5, 1.0) * min(0.002 * 2**tries, 1.0)
                    tries += 1
                elif lost(error):
                    self._sending._writer.drop()
                    next_pause = next(reconnects, None)
                    if next_pause is None:
                        raise
                    pause = next_pause
                else:
                    raise
            time.sleep(pause)
            self._send()

    def _ask(self, name: str, /, **parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of one statement, outside any transaction; asked again if the connection is lost."""
        writer = self._sending._writer
        for pause in RECONNECTS:
            try:
                return writer.ask(self._sending._statements[name], parameters)
            except psycopg.Error as error:
                if not lost(error) or not writer.own:
                    raise
                writer.drop()
                time.sleep(pause)
        return writer.ask(self._sending._statements[name], parameters)

    # --- what the answers mean

    def _starts(self, outgoing: Outgoing) -> list[StartVerdict]:
        starts = self.batch.starts
        if outgoing.begun is not None:
            return [
                Begun(run=key, id=start.id, epoch=0 if start.owner is None else 1, version=0, at=outgoing.now)
                for key, start in zip(outgoing.begun, starts, strict=True)
            ]
        if not starts:
            return []
        judged = judging.judge_starts(self._ask, starts, outgoing.now)
        return [
            self._again(Batch(starts=[start]))[0][0] if verdict is None else verdict
            for start, verdict in zip(starts, judged, strict=True)
        ]

    def _sends(self, outgoing: Outgoing) -> list[SendVerdict]:
        sends, kept = self.batch.sends, outgoing.kept
        if len(kept) == len(sends):
            return [Kept(run=kept[place]) for place in range(len(sends))]
        judged = iter(judging.judge_sends(self._ask, sends, kept))
        verdicts: list[SendVerdict] = []
        for place, send in enumerate(sends):
            verdict = Kept(run=kept[place]) if place in kept else next(judged)
            # What was refused for want of room that there is: others before it were counted and not kept.
            verdicts.append(self._again(Batch(sends=[send]))[1][0] if verdict is None else verdict)
        return verdicts

    def _turns(self, outgoing: Outgoing) -> list[TurnVerdict]:
        committed = outgoing.committed
        turns = self.batch.turns
        missed = [turn for turn in turns if turn.run not in committed]
        if not missed:
            return [Committed(run=turn.run) for turn in turns]
        judged = iter(judging.judge_turns(self._ask, missed))
        return [Committed(run=turn.run) if turn.run in committed else next(judged) for turn in turns]

    def _again(self, batch: Batch) -> tuple[list[StartVerdict], list[SendVerdict], list[TurnVerdict]]:
        if self._depth > 3:
            url = self._sending._url
            raise StoreError(
                f"The store {url} neither wrote an item nor says why. Others may be removing what stands in its way. "
                "Try again, and report it to us.",
                store=url,
            )
        return _Try(self._sending, batch, depth=self._depth + 1).verdicts()

    # --- what somebody holds up

    def _held_up(self, error: psycopg.Error) -> tuple[list[Any], list[Any], list[Any]]:
        """Write all but what is held up, which is found by halves."""
        sending = self._sending
        sending.waits += 1
        items = _items(self.batch)
        if sending.waits > MOST_WAITS:
            if not sending.wrote:
                # Not one item: somebody has locked the whole table.
                raise error
            verdicts: list[Any] = [_busy(item) for item in items]
        elif len(items) > 1:
            middle = len(items) // 2
            halves = [_batch_of(half) for half in (items[:middle], items[middle:])]
            verdicts = [each for half in halves for each in _Try(sending, half, depth=self._depth).all_verdicts()]
        else:
            sending._held.add(items[0])
            verdicts = [_busy(items[0])]
        starts, sends = len(self.batch.starts), len(self.batch.sends)
        return verdicts[:starts], verdicts[starts : starts + sends], verdicts[starts + sends :]

    # --- what cannot be stored

    def _apart(self, error: Exception) -> tuple[list[StartVerdict], list[SendVerdict], list[TurnVerdict]]:
        """Write the batch without the turns that cannot be stored."""
        batch, url = self.batch, self._sending._url
        reasons = {turn.run: reason for turn in batch.turns if (reason := self._reason(Batch(turns=[turn])))}
        if not reasons:
            raise item_refused(url, error) from error
        good = [turn for turn in batch.turns if turn.run not in reasons]
        bad = [turn for turn in batch.turns if turn.run in reasons]
        starts, sends, written = self._again(Batch(starts=batch.starts, sends=batch.sends, turns=good))
        # A fence that does not hold says so first, as for any other turn.
        verdicts = dict(zip((turn.run for turn in good), written, strict=True))
        for turn, verdict in zip(bad, judging.judge_turns(self._ask, bad), strict=True):
            stays = isinstance(verdict, (Fenced, Committed))
            verdicts[turn.run] = verdict if stays else Unstorable(run=turn.run, reason=reasons[turn.run])
        return starts, sends, [verdicts[turn.run] for turn in batch.turns]

    def _reason(self, batch: Batch) -> str:
        """Why the data of this batch cannot be stored, or nothing: tried in a transaction that is given up."""
        sending = self._sending
        try:
            calls = Outgoing(batch, sending._clock(), sending._statements).calls
            sending._writer.probe(calls)
        except PACKING_ERRORS as error:
            return str(error)
        except psycopg.Error as error:
            if not unfit(error):
                raise
            return str(error)
        return ""


def _items(batch: Batch) -> list[Start | Send | Turn]:
    """In the order of the verdicts."""
    return [*batch.starts, *batch.sends, *batch.turns]


def _batch_of(items: Sequence[Start | Send | Turn]) -> Batch:
    return Batch(
        starts=[item for item in items if isinstance(item, Start)],
        sends=[item for item in items if isinstance(item, Send)],
        turns=[item for item in items if isinstance(item, Turn)],
    )


def _without(batch: Batch, items: Sequence[Start | Send | Turn]) -> Batch:
    gone = {id(item) for item in items}
    return _batch_of([item for item in _items(batch) if id(item) not in gone])


def _busy(item: Start | Send | Turn) -> Busy:
    return Busy(run=item.run if isinstance(item, Turn) else 0)
