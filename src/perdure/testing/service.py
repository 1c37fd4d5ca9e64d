"""One worker over a store in memory, in which everything happens by choice: no thread, no sleep, a clock by hand.

A `Service` holds the runs of some programs. Whoever drives it says when the committer writes, when an answer comes
back, what the store answers instead, when the clock goes on, when the worker dies. It watches every step that
begins and every turn that is written, and raises `Broken` where a promise is broken.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from perdure.core import events as ev
from perdure.core import stored
from perdure.core.errors import StoreUnavailable
from perdure.core.match import PENDING, Line
from perdure.core.turn import Address, Batch, Busy, Committed, Mail, Row, Send, Turn, Verdict
from perdure.runtime.context import ThisRun
from perdure.runtime.loop import RunLoop
from perdure.runtime.play import Play
from perdure.runtime.registry import Registry, Workflow
from perdure.stores.memory import MemoryStore
from perdure.testing.programs import SIGNALS, Program, leaf
from perdure.testing.tape import SECOND, SEED, START, THREADS, Tape, shut
from perdure.worker.claiming import Watcher
from perdure.worker.executing import current_step
from perdure.worker.remote_end import RemoteEnd
from perdure.worker.residents import Outcome
from perdure.worker.shift import Settings, Shift

TTL: Final = 15.0
VALUES: Final[tuple[int | str, ...]] = (1, 2, 3, "no number")
FAULTS: Final = ("crash", "rob", "busy", "refused", "lost", "signal", "cancel")


class Broken(BaseException):
    """A promise was broken. No `Exception`: a step must not be able to fail with it."""


class OrdinaryLoop(RunLoop):
    """The loop of a simulated worker: the deterministic one, by the service's clock."""

    def __init__(self, now: int) -> None:
        super().__init__(Line("the worker"), now)
        self.line.now = now
        self.errors: list[BaseException] = []

    def call_soon_threadsafe(  # type: ignore[override]  # the types of the arguments are the callback's business
        self, callback: Callable[..., Any], *args: Any, **named: Any
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException) and context.get("message") == "a callback failed":
            self.errors.append(error)

    def advance(self, now: int) -> None:
        """Go on to this time: every timer that is due, then rest."""
        self.line.now = max(now, self.line.now)
        self.settle()
        while self.line.fire():
            self.settle()

    def settle(self) -> None:
        """Run until nothing is ready; what a callback raised is raised."""
        self.run_to_rest(None)
        if self.errors:
            raise self.errors.pop(0)


class ChoosyStore(MemoryStore):
    """A store whose writes can fail in every way that is no fault of the data. `fate(batch)` says how."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__(clock=clock)
        self.fate: Callable[[], str] = lambda: ""
        self.written: Callable[[Batch, Sequence[Verdict]], None] = lambda batch, verdicts: None

    def write(self, batch: Batch) -> list[Verdict]:
        fate = self.fate() if batch.turns else ""
        if fate == "refused":
            raise StoreUnavailable("The store is away.", store=self.url)
        if fate == "busy" and batch.turns and not (batch.starts or batch.sends):
            # The first turn meets a sender's open transaction.
            rest = Batch(turns=batch.turns[1:])
            verdicts = super().write(rest)
            self.written(rest, verdicts)
            return [Busy(run=batch.turns[0].run), *verdicts]
        verdicts = super().write(batch)
        self.written(batch, verdicts)
        if fate == "lost":
            raise StoreUnavailable("The answer was lost.", store=self.url)
        return verdicts


class Strict(Shift):
    """A shift that is not meant to fail itself."""

    def failed(self, one: Any, error: BaseException) -> None:
        raise error


class Service:
    """See the module. faults: how likely each kind is: crash, rob, busy, refused, lost, and so on."""

    def __init__(self, programs: Sequence[Program], seed: int, *, resident: int = 10_000) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.clock = START
        self.store = ChoosyStore(lambda: self.clock)
        self.store.written = self._written
        self.resident = resident
        self.programs = {f"run-{program.seed}": program for program in programs}
        self.workflows: dict[str, Workflow[Any, Any]] = {
            f"program-{program.seed}": program.workflow(self.work, f"program-{program.seed}") for program in programs
        }
        self.known = {**self.workflows, "leaf": leaf(self.work)}
        self.keys: dict[int, str] = {}
        self.acknowledged: dict[int, list[str]] = {}
        self.executions: Counter[tuple[str, str]] = Counter()
        self.interruptions = 0
        self.broken: list[Broken] = []
        self.count = 0
        self.zombie = False
        self.sometimes: Counter[str] = Counter()
        self.answers: deque[tuple[Any, Any, Any]] = deque()
        self.reads: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()
        self._latest: tuple[Batch, Sequence[Verdict]] | None = None
        self._begin_shift()
        for program in programs:
            self._start(program)

    # --- the worker ---

    def _begin_shift(self) -> None:
        self.loop = OrdinaryLoop(self.clock)  # type: ignore[abstract]  # the rest is refused at run time
        self.answers.clear()
        self.reads.clear()
        self.shift = Strict(
            self.store,
            Registry(workflows=list(self.known.values())),
            Settings(resident=self.resident, lease=TTL, name="one"),
            self.loop,
            kick=lambda: None,
            monotonic=lambda: self.clock / SECOND,
            random_hex=self._hex,
            spread=lambda: 1.0,
            read=lambda read, done: self.reads.append((read, done)),
        )
        self.shift.threads = THREADS
        self.shift.committer._answer = self._answer_later
        announcement = self.shift.announcement()
        self.store.announce(announcement)
        self.shift.begin(announcement)
        self.watcher = Watcher(self.store, self.shift)
        self.zombie = False

    def _hex(self, size: int) -> str:
        self.count += 1
        return blake2b(f"{self.seed}:{self.count}".encode(), digest_size=size).hexdigest()

    def _start(self, program: Program) -> None:
        start = self.shift.start_facts(
            workflow=f"program-{program.seed}", id=f"run-{program.seed}", input="[[],{}]", seed=SEED
        )
        self.store.write(Batch(starts=[start]))

    def _answer_later(self, answers: Any, mail: Any) -> None:
        self.answers.append((self._latest, answers, mail))
        self._latest = None

    # --- what may happen ---

    def flush(self) -> None:
        """The committer writes what waits."""
        if self.shift.committer.waiting:
            self.shift.committer.flush()

    def acknowledge(self) -> None:
        """The oldest answer of the store comes back."""
        if not self.answers:
            return
        latest, answers, mail = self.answers.popleft()
        if latest is not None:
            self._learn(*latest)
        self.shift._answer(answers, mail)
        self.loop.settle()

    def read(self) -> None:
        """A read that was asked for happens."""
        if self.reads:
            read, done = self.reads.popleft()
            done(read())
            self.loop.settle()

    def look(self) -> None:
        """The watcher looks for work and mail."""
        before = {key: row.epoch for key, row in self._rows().items()}
        self.watcher.step(0)
        for key, row in self._rows().items():
            if row.epoch != before.get(key):
                # The claim read the history: all of it is known to this worker.
                self.acknowledged[key] = self.store.history(key)
        self.loop.settle()

    def go_on(self, most: int) -> None:
        """The clock goes on by at most so much, to the next timer if there is one."""
        self.clock = min([self.clock + most, *self._upcoming()])
        self.loop.advance(self.clock)

    def _upcoming(self) -> list[int]:
        """When something is to happen by itself."""
        times = [self.loop.line.next_timer(), *(row.wake_at for row in self._rows().values())]
        return [time for time in times if time is not None and time > self.clock]

    def beat(self) -> None:
        """A heartbeat."""
        assert self.shift.heartbeat is not None
        self.shift.heartbeat.step()
        self.loop.settle()

    def signal(self, run: str, name: str, value: int | str) -> None:
        """A client sends a signal."""
        self.count += 1
        send = Send(
            to=Address(namespace="default", id=run),
            id=f"m{self.count}",
            kind="signal",
            name=name,
            data=json.dumps(value),
        )
        self.store.write(Batch(sends=[send]))

    def cancel(self, run: str) -> None:
        """A client asks a run to cancel."""
        send = Send(
            to=Address(namespace="default", id=run), id="perdure:cancel", kind="cancel", data='{"reason":"enough"}'
        )
        self.store.write(Batch(sends=[send]))

    def crash(self) -> None:
        """The worker dies with everything in its memory; another one begins, and reaps it."""
        self.interruptions += 1
        incarnation = self.shift.incarnation
        self.shift.close()
        self.clock += int(TTL * SECOND) + 1
        self._begin_shift()
        self.store.reap()
        # A crash is not what these programs are tried for: strikes are forgiven.
        for key in list(self._rows()):
            run = self.store._runs[key]
            run.row = replace(run.row, strikes=0)
        assert self.store.worker(incarnation) is None

    def rob(self) -> None:
        """The worker's runs are given to others while it goes on: every turn of it is fenced."""
        self.interruptions += 1
        self.store.retire(self.shift.incarnation)
        self.zombie = True

    def find_out(self) -> None:
        """A robbed worker hears of it, and becomes a new incarnation."""
        self.beat()
        while self.reads:
            self.read()
        self.watcher = Watcher(self.store, self.shift)
        self.zombie = False

    # --- what steps do ---

    async def work(self, id: str) -> int:
        """The function of every step: takes a while, fails now and then, the same at every execution."""
        info = current_step()
        try:
            self._began(info.run_id, info.id, info.attempt)
        except Broken as broken:
            self.broken.append(broken)
        luck = int(blake2b(f"{info.run_id}/{id}/{info.attempt}".encode(), digest_size=4).hexdigest(), 16)
        pause = (0, 0, 0.3, 1.5, 4)[luck % 5]
        if pause:
            await asyncio.sleep(pause)
        if luck // 5 % 4 == 0:
            raise ValueError(f"no luck with {id}")
        return luck % 1000

    # --- what is watched ---

    def _rows(self) -> dict[int, Row]:
        return {key: run.row for key, run in self.store._runs.items()}

    def _learn(self, batch: Batch, verdicts: Sequence[Verdict]) -> None:
        """A worker has heard that these turns are written."""
        for turn, verdict in zip(batch.turns, verdicts[len(batch.starts) + len(batch.sends) :], strict=True):
            if isinstance(verdict, Committed):
                known = self.acknowledged.setdefault(turn.run, [])
                if len(known) == turn.first_seq - 1:
                    known.extend(turn.events)

    def _began(self, run: str, step: str, attempt: int) -> None:
        """No function begins before the commit that holds its cause is acknowledged, none after its outcome."""
        self.executions[run, step] += 1
        if self.zombie:
            self.sometimes["began robbed"] += 1
            return
        row = self.store.run("default", run)
        assert row is not None
        play = self.cold(row, self.acknowledged.get(row.key, []))
        op = play.line.ops.get(step)
        shut(play)
        if op is None or op.state != PENDING or op.attempt != attempt:
            found = "nothing" if op is None else f"state {op.state}, attempt {op.attempt}"
            raise Broken(f"{run}: attempt {attempt} of {step} began, the acknowledged history says {found}")
        if op.retry_at is not None and op.retry_at > self.clock:
            raise Broken(f"{run}: attempt {attempt} of {step} began {op.retry_at - self.clock} us early")

    def _written(self, batch: Batch, verdicts: Sequence[Verdict]) -> None:
        self._latest = (batch, verdicts)
        for turn, verdict in zip(batch.turns, verdicts[len(verdicts) - len(batch.turns) :], strict=True):
            self.sometimes[type(verdict).__name__] += 1
            if isinstance(verdict, Committed):
                self._judge(turn)

    def _judge(self, turn: Turn) -> None:
        """The history replays cold, to where the run says it stands; a parked run will be woken in time."""
        row = self._rows()[turn.run]
        if row.turn != turn.id:
            return
        history = self.store.history(turn.run)
        play = self.cold(row, history)
        try:
            if turn.status == "blocked" or play.difference is not None:
                raise Broken(f"{row.id}: {play.difference} / {turn.waits}")
            if turn.closing:
                if play.end is None or (play.end.status, play.end.result) != (row.status, row.result):
                    raise Broken(f"{row.id} ended as {row.status}, its history ends as {play.end}")
                return
            if play.take().commands and len(history) > 1:
                raise Broken(f"{row.id}: its history lacks commands")
            if play.over:
                raise Broken(f"{row.id}: its history has ended, its row is {turn.status}")
            if turn.status == "waiting":
                self._judge_parked(row, play)
        finally:
            shut(play)

    def _judge_parked(self, row: Row, play: Play) -> None:
        line = play.line
        wakes = [line.next_timer()]
        for op in line.pending.values():
            if op.kind == "run":
                if op.retry_at is None:
                    raise Broken(f"{row.id} is parked, and nobody executes {op.id}")
                wakes.append(op.retry_at)
        first = min((time for time in wakes if time is not None), default=None)
        if first is not None and (row.wake_at is None or row.wake_at > first):
            raise Broken(f"{row.id} is parked until {row.wake_at}, and its timer is due at {first}")

    def cold(self, row: Row, history: Sequence[str]) -> Play:
        """A play of this run, brought to the end of a history by nothing but its events."""
        this = ThisRun(
            id=row.id,
            generation=1,
            workflow=row.workflow,
            queue="default",
            namespace="default",
            attempt=1,
            max_attempts=1,
            parent=row.parent_id,
            root=row.id,
            created_micros=row.created_at,
        )
        play = Play(
            self.known[row.workflow],
            this,
            seed=row.seed,
            input=row.input,
            limits=self.shift.limits,
            known=self.known,
            threads=THREADS,
        )
        for _ in play.replay([stored.decode(text) for text in history]):
            pass
        return play

    # --- the end ---

    def heal(self) -> None:
        """Nothing goes wrong any more: every run must come to its end, or wait for what only a client can bring."""
        self.store.fate = lambda: ""
        if self.zombie:
            self.find_out()
        still = 0
        live: list[Row] = []
        for turn in range(2000):
            before = self._progress()
            self.quiet()
            live = [row for row in self._rows().values() if row.ended_at is None]
            if not live:
                break
            if turn % 3 == 0:
                self.go_on(3600 * SECOND)
                self.beat()
            after = self._progress()
            still = still + 1 if before == after and not self._upcoming() else 0
            if still > 6:
                # Only clients can help now.
                still = 0
                for row in live:
                    if row.status != "waiting":
                        raise Broken(f"{row.id} is {row.status} for ever: {row.waits}")
                if turn > 800:
                    # They have swallowed the request, or wait for what only their own code could bring.
                    break
                for row in live:
                    self.signal(row.id, self.rng.choice(SIGNALS), 7)
                    if turn > 400:
                        self.cancel(row.id)
        else:
            raise Broken(f"no end in sight: {[(row.id, row.status, row.waits) for row in live]}")
        self.audit()

    def _progress(self) -> Any:
        return self.store._news, sum(self.executions.values()), sum(row.version for row in self._rows().values())

    def quiet(self) -> None:
        """Everything that can happen at this instant happens."""
        for _ in range(200):
            self.look()
            self.flush()
            while self.answers:
                self.acknowledge()
            while self.reads:
                self.read()
            if not self.shift.committer.waiting and not self.answers:
                return
        raise Broken(f"no rest at {self.clock}")

    def whole(self) -> None:
        """Raise what a step has seen broken."""
        if self.broken:
            raise self.broken[0]

    def audit(self) -> None:
        """The ledger of executions against the histories."""
        self.whole()
        for key, row in self._rows().items():
            recorded: Counter[str] = Counter()
            cancelled: set[str] = set()
            for text in self.store.history(key):
                event = stored.decode(text)
                if isinstance(event, (ev.StepCompleted, ev.StepFailed, ev.AttemptFailed)):
                    recorded[event.step] += 1
                elif isinstance(event, ev.StepCancelled):
                    cancelled.add(event.step)
            for (run, step), times in self.executions.items():
                if run == row.id and times > recorded[step] + (step in cancelled) + self.interruptions:
                    raise Broken(
                        f"{run}: {step} was executed {times} times, {recorded[step]} attempts are recorded, "
                        f"{self.interruptions} interruptions"
                    )

    def close(self) -> None:
        """Leave nothing behind."""
        self.shift.close()


def played_again(tape: Tape, seed: int, *, patience: float) -> list[str]:
    """The history that a worker writes to whom a tape's inputs happen, at their times.

    patience: how likely an answer of the store, or a write, is late; 0 is one input per turn.
    """
    rng = random.Random(seed)
    service = Service([tape.program], seed)
    shift = service.shift
    shift.execute = lambda *begun: None  # type: ignore[method-assign]  # outcomes come from the tape
    service.look()
    (resident,) = shift.residents.values()
    try:
        for beat in tape.beats[1:]:
            while rng.random() >= patience and (shift.committer.waiting or service.answers):
                if rng.random() >= patience:
                    service.flush()
                if rng.random() >= patience:
                    service.acknowledge()
            event = beat.input
            service.clock = event.at
            if isinstance(event, (ev.StepCompleted, ev.StepFailed, ev.AttemptFailed)):
                resident.executions.pop(event.step, None)
            if isinstance(event, ev.StepCompleted):
                resident.outcome(Outcome(event.step, event.attempt, raw=bytes(event.value)))
            elif isinstance(event, (ev.StepFailed, ev.AttemptFailed)):
                final = isinstance(event, ev.StepFailed)
                resident.outcome(Outcome(event.step, event.attempt, error=event.error, final=final))
            elif isinstance(event, ev.Time):
                resident.tick()
            else:
                mail = _mail_of(event)
                service.store.write(Batch(sends=[Send(to=resident.key, **mail)]))
                resident.post(Mail(run=resident.key, position=1, at=event.at, **mail))
        while shift.committer.waiting or service.answers:
            service.flush()
            service.acknowledge()
        return service.store.history(resident.key)
    finally:
        service.close()


def _mail_of(event: ev.Input) -> dict[str, Any]:
    """The message that becomes this input."""
    if isinstance(event, ev.Signal):
        return {"id": event.message, "kind": "signal", "name": event.name, "data": bytes(event.value).decode()}
    if isinstance(event, ev.CancelRequested):
        return {"id": event.message, "kind": "cancel", "name": "", "data": json.dumps({"reason": event.reason})}
    assert isinstance(event, ev.ChildEnded)
    end = RemoteEnd(step=event.step, run=event.run, status=event.status, value=event.value, error=event.error)
    data = msgspec.json.encode(end).decode()
    return {"id": event.message, "kind": "child_ended", "name": event.step, "data": data}


def random_life(programs: Sequence[Program], seed: int, *, actions: int = 120) -> Service:
    """A life full of faults, and its healing."""
    rng = random.Random(seed)
    service = Service(programs, seed, resident=rng.choice([0, 0, 1, 10_000]))
    chances = {
        fault: rng.choice([0.0, 0.0, 0.03, 0.15])
        for fault in ("crash", "rob", "busy", "refused", "lost", "signal", "cancel")
    }
    service.store.fate = lambda: next((f for f in ("busy", "refused", "lost") if rng.random() < chances[f]), "")
    slow = rng.choice([1, 2, 5])
    try:
        for _ in range(actions):
            for fault in ("crash", "rob", "signal", "cancel"):
                if rng.random() < chances[fault] * (0.3 if fault in ("crash", "rob", "cancel") else 1):
                    service.sometimes[fault] += 1
                    run = rng.choice(sorted(service.programs))
                    if fault == "crash":
                        service.crash()
                    elif fault == "rob" and not service.zombie:
                        service.rob()
                    elif fault == "signal":
                        service.signal(run, rng.choice(SIGNALS), rng.choice(VALUES))
                    elif fault == "cancel":
                        service.cancel(run)
            act = rng.randrange(8 + slow)
            if act == 0 or act == 1:
                service.flush()
            elif act == 2 or act == 3:
                service.acknowledge()
            elif act == 4:
                service.read()
            elif act == 5:
                service.look()
            elif act == 6:
                service.beat() if not service.zombie else service.find_out()
            else:
                service.go_on(rng.choice([0, 1, SECOND // 3, SECOND, 5 * SECOND]))
            service.whole()
        service.heal()
    finally:
        service.close()
    return service
