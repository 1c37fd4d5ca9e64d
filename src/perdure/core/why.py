"""One sentence on what a run waits for, since when, and who could move it. Pure: told the row and the time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from shlex import quote

from perdure.core.ids import typed
from perdure.core.retry import length, moment
from perdure.core.turn import Announced, Mail, Row
from perdure.core.waits import Wait, Waits, read_waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the sentence needs beyond the row.

    taken: every workflow name (and activity name) that any worker ever announced, with the queues from which the
    living workers that serve it take; none if none lives. worker: name of the living owner, None if there is none.
    mail: unread. children: the live ones, by run id. held: whether somebody's open transaction holds the run.
    """

    taken: Mapping[str, Collection[str]]
    worker: str | None
    mail: Sequence[Mail]
    children: Mapping[str, Row]
    held: bool = False

    def serves(self, name: str) -> bool:
        """Whether a living worker serves this workflow or activity, from any queue."""
        return bool(self.taken.get(name))

    def takes(self, name: str, queue: str) -> bool:
        """Whether one of them takes from this queue."""
        return queue in self.taken.get(name, ())


def taken_from(announced: Iterable[Announced]) -> dict[str, set[str]]:
    """The queues of each name, from what a store says was announced."""
    taken: dict[str, set[str]] = {}
    for each in announced:
        taken.setdefault(each.name, set()).update(each.queues)
    return taken


def why(row: Row, now: int, around: Surroundings) -> str:
    """The sentence; for a blocked run the whole report."""
    sentence = _BY_STATUS.get(row.status, _unknown)(row, now, around)
    if around.held:
        sentence += (
            " An open transaction holds it, a transaction step's of its own or one that has signalled it: it ends only "
            "after that."
        )
    if row.deadline_at is None or row.ended_at is not None:
        return sentence
    return f"{sentence} Its timeout ends it at {_at(row.deadline_at)} ({_due(row.deadline_at, now)})."


def _ended(row: Row, now: int, around: Surroundings) -> str:
    when = moment(row.ended_at).strftime("%Y-%m-%d %H:%M:%S UTC") if row.ended_at else "earlier"
    return f"Run {row.id} has ended: it is {row.status.replace('_', ' ')} since {when}, nothing can move it."


def _scheduled(row: Row, now: int, around: Surroundings) -> str:
    return (
        f"Run {row.id} starts at {_at(row.wake_at)}, in {_length((row.wake_at or now) - now)}; cancel it to stop that."
    )


def _ready(row: Row, now: int, around: Surroundings) -> str:
    # A run that was begun has lost its worker since; nothing tells when, so its age would mislead.
    begun = row.started_at is not None
    since = f"since {_length(now - row.created_at)}"
    run = f"Run {row.id}, begun {_length(now - (row.started_at or now))} ago," if begun else f"Run {row.id}"
    what = "workflow" if row.kind == "workflow" else "activity"
    waits = "waits for another worker" if begun else f"waits for a worker {since}"
    if not around.serves(row.workflow):
        if row.workflow in around.taken:
            return (
                f'{run} {waits}: none that serves {what} "{row.workflow}" lives now; start one with '
                "`perdure worker MODULE`."
            )
        return f'{run} {waits}: nobody has ever announced {what} "{row.workflow}"; start a worker that serves it.'
    if not around.takes(row.workflow, row.queue):
        return f"{run} {waits}: {_wrong_queue(row.workflow, row.queue, around)}."
    if row.strikes >= 2:
        return (
            f"{run} waits to be executed alone, because it killed its worker {row.strikes} times; "
            "a worker gives it a process of its own, an engine takes it when nothing else of its is executing."
        )
    return (
        f'{run} waits for room in a worker{"" if begun else f" {since}"}: workers serve "{row.workflow}", '
        f'and one that serves queue "{row.queue}" takes it; more workers would take it sooner.'
    )


def _held(row: Row, now: int, around: Surroundings) -> str:
    return f"Run {row.id} is held by a limit since {_length(now - row.created_at)}; it goes on when a slot is free."


def _running(row: Row, now: int, around: Surroundings) -> str:
    waits = read_waits(row.waits)
    step = next((wait for wait in waits.waits if wait.kind == "step"), None)
    if step is not None:
        doing = f'step "{step.step}"{_site(step)}, attempt {step.attempt}{_of(step)}'
        if around.worker is None:
            return (
                f"Run {row.id} was running {doing}, in a worker that no longer answers; another worker takes the run "
                "over when that one is known to be dead, and repeats the step."
            )
        return (
            f"Run {row.id} is running {doing}, in worker {around.worker} since {_length(now - step.since)}; "
            f"it goes on when the step's function returns.{_changed(waits)}"
        )
    if around.worker is None:
        return (
            f"Run {row.id} was being executed by a worker that no longer answers; another worker takes it over when "
            "that one is known to be dead."
        )
    return f"Run {row.id} is being executed by worker {around.worker}; nothing has to be done."


def _blocked(row: Row, now: int, around: Surroundings) -> str:
    waits = read_waits(row.waits)
    return waits.blocked or f"Run {row.id} is blocked: its code differs from its history."


def _quarantined(row: Row, now: int, around: Surroundings) -> str:
    said = read_waits(row.waits).restless.rstrip(".")
    reason = said[:1].lower() + said[1:] or f"it killed its worker {row.strikes} times, the last time executed alone"
    return f"Run {row.id} is quarantined: {reason}; mend its code, then terminate it and start anew."


def _paused(row: Row, now: int, around: Surroundings) -> str:
    return f"Run {row.id} is paused; whoever paused it can resume it."


def _unknown(row: Row, now: int, around: Surroundings) -> str:
    return f"Run {row.id} is {row.status}."


def _waiting(row: Row, now: int, around: Surroundings) -> str:
    waits = read_waits(row.waits)
    if row.owner is None and not around.takes(row.workflow, row.queue) and around.mail:
        number = len(around.mail)
        unread = f"Run {row.id} has {number} unread {'message' if number == 1 else 'messages'}"
        if around.serves(row.workflow):
            return f"{unread}: {_wrong_queue(row.workflow, row.queue, around)}."
        return (
            f'{unread}, but no worker that serves "{row.workflow}" lives now; start one with `perdure worker MODULE`.'
        )
    if waits.restless:
        return (
            f"Run {row.id} was interrupted because its code did not rest ({waits.restless}); it is tried again in "
            f"{_length((row.wake_at or now) - now)}; put what takes long into a step."
        )
    if not waits.waits:
        if row.wake_at is None:
            return f"Run {row.id} waits; its worker has not written yet what for."
        return f"Run {row.id} waits for its next turn ({_due(row.wake_at, now)}); only time moves it."
    first = waits.waits[0]
    sentence = f"Run {row.id} {_WAITS.get(first.kind, _wait_other)(row, first, now, around)}"
    others = len(waits.waits) - 1 + waits.more
    if others:
        sentence += f" It waits for {others} more {'thing' if others == 1 else 'things'} beside."
    if waits.cancel is not None:
        reason = f' ("{waits.cancel}")' if waits.cancel else ""
        sentence += f" It was asked to cancel{reason} and has not ended: its code ignores that or is cleaning up."
    sentence += _changed(waits)
    if not around.serves(row.workflow):
        sentence += f' No worker that serves "{row.workflow}" lives now.'
    elif not around.takes(row.workflow, row.queue):
        sentence += f' No living worker that serves "{row.workflow}" takes from its queue "{row.queue}".'
    return sentence


def _changed(waits: Waits) -> str:
    if not waits.changed:
        return ""
    return f" Step {waits.changed} is called with other arguments than recorded; the recorded outcome was used."


def _wait_sleep(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    return (
        f'sleeps in "{wait.step}"{_site(wait)} since {_length(now - wait.since)}, until {_at(wait.until)} '
        f"({_due(wait.until, now)}); {_only_time(wait.until, now)}."
    )


def _wait_signal(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    until = f", until {_at(wait.until)}" if wait.until is not None else ", without a timeout"
    return (
        f'waits in "{wait.step}"{_site(wait)} for signal "{wait.name}" since {_length(now - wait.since)}{until}; '
        f"whoever sends it moves the run: `perdure signal {typed(row.id, wait.name)}`."
    )


def _wait_child(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    child = around.children.get(wait.run)
    state = f", which is {child.status}" if child is not None else ""
    return (
        f'waits in "{wait.step}"{_site(wait)} for child run {wait.run}{state}, since {_length(now - wait.since)}; '
        f"see `perdure why {typed(wait.run)}`."
    )


def _wait_activity(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    activity = around.children.get(wait.run)
    if around.serves(wait.name) and activity is not None and not around.takes(wait.name, activity.queue):
        return (
            f'waits in "{wait.step}"{_site(wait)} for activity "{wait.name}" since {_length(now - wait.since)}: '
            f"{_wrong_queue(wait.name, activity.queue, around)}."
        )
    if not around.serves(wait.name):
        return (
            f'waits in "{wait.step}"{_site(wait)} for activity "{wait.name}" since {_length(now - wait.since)}; '
            "no living worker serves it: start one."
        )
    return (
        f'waits in "{wait.step}"{_site(wait)} for activity "{wait.name}" since {_length(now - wait.since)}; '
        "a worker of its queue moves it."
    )


def _wait_retry(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    return (
        f'waits to try step "{wait.step}"{_site(wait)} again, attempt {wait.attempt}{_of(wait)}, '
        f"{_due(wait.until, now)}; the last attempt failed with "
        f"{wait.error or 'an error'}; {_only_time(wait.until, now)}."
    )


def _wait_timer(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    return f"waits for a timer of its own code until {_at(wait.until)} ({_due(wait.until, now)}); only time moves it."


def _wait_nothing(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    return (
        f"waits for nothing that can come, since {_length(now - wait.since)}: its code awaits an asyncio object that "
        "nothing of it will ever set; terminate it and mend the code."
    )


def _wait_other(row: Row, wait: Wait, now: int, around: Surroundings) -> str:
    return f'waits in "{wait.step}"{_site(wait)} since {_length(now - wait.since)}.'


_BY_STATUS = {
    "scheduled": _scheduled,
    "ready": _ready,
    "held": _held,
    "running": _running,
    "waiting": _waiting,
    "blocked": _blocked,
    "quarantined": _quarantined,
    "paused": _paused,
    **dict.fromkeys(("completed", "failed", "cancelled", "terminated", "timed_out", "continued"), _ended),
}

_WAITS = {
    "sleep": _wait_sleep,
    "signal": _wait_signal,
    "child": _wait_child,
    "activity": _wait_activity,
    "retry": _wait_retry,
    "timer": _wait_timer,
    "nothing": _wait_nothing,
}


def _wrong_queue(name: str, queue: str, around: Surroundings) -> str:
    """Workers serve this name, but not from the queue in which its run is."""
    others = ", ".join(f'"{each}"' for each in sorted(around.taken[name]))
    return (
        f'workers that serve "{name}" live, but none of them takes from queue "{queue}" (they take from {others}); '
        f"start one with `perdure worker MODULE --queue {quote(queue)}`"
    )


def _site(wait: Wait) -> str:
    return f" ({wait.site})" if wait.site else ""


def _of(wait: Wait) -> str:
    return f" of {wait.attempts}" if wait.attempts else ""


def _at(at: int | None) -> str:
    return "an unknown time" if at is None else moment(at).strftime("%Y-%m-%d %H:%M:%S UTC")


def _only_time(until: int | None, now: int) -> str:
    if until is not None and until <= now:
        return "a worker that serves it takes it at its next look"
    return "only time, or a cancel, moves it"


def _due(at: int | None, now: int) -> str:
    if at is None:
        return "at no known time"
    return f"in {_length(at - now)}" if at > now else f"due since {_length(now - at)}"


def _length(micros: int) -> str:
    """In whole seconds from one second on: nobody waits for a tenth of one."""
    return length(timedelta(microseconds=micros if micros < 1_000_000 else micros // 1_000_000 * 1_000_000))
