"""One batch as a fixed list of statements over many rows each, and what their answers mean.

All of them are sent before any answer is read. So no statement takes an answer's word: each one looks itself at what
those before it have written, through lists of keys that live as long as the transaction (`perdure_batch.…`). A fenced
turn writes nothing and its neighbours commit. What was written less than asked is found out afterwards (`judging.py`).

The order is that of the locks: the targets of mail, the runs that end, the turns, then what is new. Mail comes last,
to whoever is still live then: a run that ends in this batch gets none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from perdure.core.turn import Address, Batch, Key, Send, Start, Turn
from perdure.stores.postgres.packing import PACK
from perdure.stores.postgres.queries import Statement
from perdure.stores.refused import child_refused
from perdure.stores.verdicts import AT_WAKE, BEFORE, ENDS

NONE: Final = -1
"""Stands for null where a number is packed, and for "nobody"."""

KEEPS_STRIKES, STRIKE, HEEDS_MAIL, IS_END, RELEASE = 1, 2, 4, 8, 16
"""Bits of a turn's flags, as `commit_turns` reads them."""


class Call(NamedTuple):
    """A statement with its parameters, packed."""

    statement: Statement
    values: Sequence[bytes | None]


TURN: Final = ("run", "owner", "epoch", "version", "last", "id", "status", "before", "due_at", "wake_at", "waits",
               "flags", "attempt", "follows", "events", "bytes", "result", "error")  # fmt: skip
"""What the fence and the new state of a run are made of, in the order of `turn_row`."""


def turn_row(turn: Turn, size: int) -> tuple[Any, ...]:
    """One turn as a row of `TURN`; size: bytes of its events."""
    status = str.__str__(turn.status)
    flags = 0 if turn.progress else KEEPS_STRIKES
    if turn.strike:
        flags |= STRIKE
    due_at = wake_at = NONE
    waits = ""
    if status in ENDS:
        flags |= IS_END | RELEASE
    else:
        waits = turn.waits
        if turn.wake_at is not None:
            wake_at = turn.wake_at
        if turn.owner is None or turn.release:
            flags |= RELEASE
            due_at = _due(status, wake_at)
    if turn.closing and not turn.forced:
        flags |= HEEDS_MAIL
    follows = NONE
    if turn.events:
        # One below 1 follows nothing that there can be.
        follows = turn.first_seq - 1 if turn.first_seq > 0 else 2**31 - 1
    return (
        *(turn.run, turn.owner, turn.epoch, turn.version, turn.last, turn.id, status),
        *(BEFORE[status], due_at, wake_at, waits, flags, NONE if turn.attempt is None else turn.attempt),
        *(follows, len(turn.events), size, turn.result, turn.error),
    )


class Outgoing:
    """See the module. `calls` are to be executed in one transaction, and their answers given to `read`.

    No two turns of the batch are of one run. Those of a status that nobody knows are left out.
    """

    def __init__(self, batch: Batch, now: int, statements: Mapping[str, Statement]) -> None:
        self.batch: Final = batch
        self.now: Final = now
        self.calls: list[Call] = []
        self.news = bool(batch.sends)
        """Whether somebody may wait for what this writes."""
        self.committed: set[Key] = set()
        self.begun: list[Key] | None = []
        """The keys of the batch's own starts; None if some of them were not begun."""
        self.kept: dict[int, Key] = {}
        """The places of the batch's own sends that were kept, and their runs."""

        self._statements = statements
        self._places: dict[str, int] = {}
        self._starts: list[tuple[Key, Start]] = [(NONE, start) for start in batch.starts]
        self._letters: list[tuple[Key, int, Send]] = [(NONE, NONE, send) for send in batch.sends]
        self._children: list[Start] = []
        turns = [turn for turn in batch.turns if turn.status in BEFORE]
        for by_run, start in self._starts:
            self._tell_parent(by_run, start)
        for turn in turns:
            for start in turn.starts:
                self._starts.append((turn.run, start))
                self._tell_parent(turn.run, start)
            self._letters += [(turn.run, NONE, send) for send in turn.sends]
        if self._letters:
            self._lock_targets()
        if turns:
            self._commit(turns)
        if self._starts:
            self._start()
        if self._letters:
            self._put_mail()

    # --- what they answered ---

    def read(self, answers: Sequence[Any]) -> None:
        """Take the answers, one result of libpq for each call."""
        places = self._places
        if "commit_turns" in places:
            text = answers[places["commit_turns"]].get_value(0, 0)
            self.committed = {int(key) for key in text.split(b",")} if text else set()
        if "start_runs" in places:
            result = answers[places["start_runs"]]
            keys = sorted(int.from_bytes(result.get_value(row, 0), "big") for row in range(result.ntuples))
            wanted = sum(by_run == NONE or by_run in self.committed for by_run, _ in self._starts)
            # Drawn in the order of the batch, in which its own starts come first.
            self.begun = keys[: len(self.batch.starts)] if len(keys) == wanted else None
        if "put_mail" in places and self.batch.sends:
            result = answers[places["put_mail"]]
            self.kept = {
                int.from_bytes(result.get_value(row, 0), "big") - 1: int.from_bytes(result.get_value(row, 1), "big")
                for row in range(result.ntuples)
            }

    # --- how they are made ---

    def _call(self, name: str, /, **values: Any) -> None:
        statement = self._statements[name]
        packed = [PACK[type](values[name]) for name, type in zip(statement.parameters, statement.types, strict=True)]
        self._places[name] = len(self.calls)
        self.calls.append(Call(statement, packed))

    def _tell_parent(self, by_run: Key, start: Start) -> None:
        """Prepare what the parent is told if the start finds its id taken."""
        if start.parent is not None and start.awaited:
            self._children.append(start)
            self._letters.append((by_run, len(self._children), child_refused(start)))

    def _lock_targets(self) -> None:
        runs: set[Key] = set()
        addresses: set[tuple[str, str]] = set()
        links: set[tuple[Key, str]] = set()
        for _, _, send in self._letters:
            to = send.to
            if isinstance(to, int):
                runs.add(to)
            elif isinstance(to, Address):
                addresses.add((to.namespace, to.id))
            else:
                links.add((to.run, to.step))
        self._call(
            "lock_targets",
            to_run=sorted(runs),
            to_namespace=[namespace for namespace, _ in addresses],
            to_id=[id for _, id in addresses],
            to_parent=[run for run, _ in links],
            to_step=[step for _, step in links],
        )

    def _commit(self, turns: Sequence[Turn]) -> None:
        turns = sorted(turns, key=lambda turn: turn.run)
        event_runs: list[Key] = []
        seqs: list[int] = []
        events: list[str] = []
        consumed_runs: list[Key] = []
        consumed_ids: list[str] = []
        ending: list[Key] = []
        exposed: list[Key] = []
        rows: list[tuple[Any, ...]] = []
        append = rows.append
        for turn in turns:
            run = turn.run
            if turn.status in ENDS:
                ending.append(run)
            elif turn.owner is None:
                exposed.append(run)
                self.news = True
            elif turn.release:
                self.news = True
            new = turn.events
            size = 0
            if new:
                seq = turn.first_seq
                for event in new:
                    event_runs.append(run)
                    seqs.append(seq)
                    seq += 1
                    size += len(event) if event.isascii() else len(event.encode())
                events += new
            for id in turn.consumed:
                consumed_runs.append(run)
                consumed_ids.append(id)
            if turn.sends or turn.starts:
                self.news = True
            append(turn_row(turn, size))
        if ending:
            self._call("lock_ending", run=ending)
        columns = zip(*rows, strict=True)
        self._call(
            "commit_turns",
            now=self.now,
            consumed_run=consumed_runs,
            consumed_id=consumed_ids,
            **dict(zip(TURN, columns, strict=True)),
        )
        if events:
            self._call("append_events", run=event_runs, seq=seqs, event=events)
        if consumed_ids:
            self._call("consume_mail", run=consumed_runs, id=consumed_ids)
        if exposed:
            self._call("call_again", run=exposed)

    def _start(self) -> None:
        now = self.now
        rows: list[tuple[Any, ...]] = []
        keyed: list[Start] = []
        for by_run, start in self._starts:
            later = start.start_at
            if later is None or later <= now:
                later = NONE
            if later != NONE or start.owner is None:
                self.news = True
            parent = start.parent
            if start.idempotency_key is not None:
                keyed.append(start)
            rows.append(
                (
                    *(by_run, start.namespace, start.id, start.kind, start.workflow, start.queue, start.priority),
                    *(start.owner, later, NONE if start.deadline_at is None else start.deadline_at),
                    *(NONE if parent is None else parent.run, None if parent is None else parent.step),
                    *(start.parent_close, start.seed, start.digest, start.language, start.dialect, start.policy),
                    *(start.tags, start.input, start.event, start.idempotency_scope, start.idempotency_key),
                    NONE if start.idempotency_until is None else start.idempotency_until,
                )
            )
        names = ("by_run", "namespace", "id", "kind", "workflow", "queue", "priority", "owner", "wake_at",
                 "deadline_at", "parent", "parent_step", "parent_close", "seed", "digest", "language", "dialect",
                 "policy", "tags", "input", "event", "scope", "idempotency_key", "expires_at")  # fmt: skip
        self._call("start_runs", now=now, **dict(zip(names, zip(*rows, strict=True), strict=True)))
        if keyed:
            self._call(
                "drop_keys",
                namespace=[start.namespace for start in keyed],
                scope=[start.idempotency_scope for start in keyed],
                idempotency_key=[start.idempotency_key for start in keyed],
            )
        if self._children:
            self._call(
                "find_refused",
                now=now,
                namespace=[start.namespace for start in self._children],
                id=[start.id for start in self._children],
                seed=[start.seed for start in self._children],
                parent=[start.parent.run for start in self._children if start.parent is not None],
                step=[start.parent.step for start in self._children if start.parent is not None],
                scope=[start.idempotency_scope for start in self._children],
                idempotency_key=[start.idempotency_key for start in self._children],
            )

    def _put_mail(self) -> None:
        letters = self._letters
        places = [addressed(send) for _, _, send in letters]
        self._call(
            "put_mail",
            now=self.now,
            asked=len(self.batch.sends),
            limited=any(send.limit is not None for _, _, send in letters),
            by_run=[by_run for by_run, _, _ in letters],
            refused=[refused for _, refused, _ in letters],
            to_run=[place[0] for place in places],
            to_parent=[place[1] for place in places],
            to_namespace=[place[2] for place in places],
            to_id=[place[3] for place in places],
            id=[send.id for _, _, send in letters],
            kind=[send.kind for _, _, send in letters],
            name=[send.name for _, _, send in letters],
            data=[send.data for _, _, send in letters],
            room=[NONE if send.limit is None else max(send.limit, 0) for _, _, send in letters],
        )


def addressed(send: Send) -> tuple[Key, Key, str | None, str | None]:
    """Where a message goes, as the statements take it: run, parent, namespace, id or step."""
    to = send.to
    if isinstance(to, int):
        # A key below 1 is nobody's, and -1 would mean that there is none.
        return (to if to > 0 else 0), NONE, None, None
    if isinstance(to, Address):
        return NONE, NONE, to.namespace, to.id
    return NONE, (to.run if to.run > 0 else 0), None, to.step


def _due(status: str, wake_at: int) -> int:
    """When an unowned run may be claimed, its mail aside."""
    if status == "ready":
        return 0
    if status in AT_WAKE and wake_at != NONE:
        return max(wake_at, 0)
    return NONE
