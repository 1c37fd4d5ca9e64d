"""`why` answers in one sentence. Each test is one sentence, whole, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from perdure.core.turn import Mail, Row
from perdure.core.waits import Wait, Waits, waits_text
from perdure.core.why import Surroundings, why

SECOND = 1_000_000
NOW = 1_800_000_000 * SECOND  # 2027-01-15 08:00:00 UTC


def row(status: str, *waits: Wait, **facts: Any) -> Row:
    """A run `o-1` of workflow `order`, created 90 s ago."""
    column = facts.pop("column", waits_text(Waits(waits=list(waits))) if waits else "")
    known: dict[str, Any] = {
        "key": 1,
        "namespace": "default",
        "id": "o-1",
        "generation": 1,
        "kind": "workflow",
        "workflow": "order",
        "queue": "default",
        "priority": 0,
        "status": status,
        "owner": None,
        "epoch": 1,
        "version": 1,
        "turn": "",
        "created_at": NOW - 90 * SECOND,
        "started_at": None,
        "ended_at": None,
        "wake_at": None,
        "deadline_at": None,
        "attempt": 1,
        "strikes": 0,
        "waits": column,
        "parent": None,
        "parent_id": None,
        "parent_step": None,
        "parent_close": "cancel",
        "seed": "",
        "input": "[[],{}]",
        "result": None,
        "error": None,
        "history_events": 1,
        "history_bytes": 1,
        "language": "",
        "dialect": "",
        "policy": "",
        "tags": "",
    }
    return Row(**{**known, **facts})


def said(
    of: Row,
    *,
    served: bool = True,
    announced: bool = True,
    worker: str | None = None,
    mail: int = 0,
    children: Mapping[str, Row] | None = None,
    activities: tuple[str, ...] = (),
    queues: tuple[str, ...] = ("default",),
    held: bool = False,
) -> str:
    """What `why` says of a run in these surroundings."""
    letters = [
        Mail(run=1, position=at, id=f"m{at}", kind="signal", name="approval", data="1", at=NOW) for at in range(mail)
    ]
    around = Surroundings(
        taken={**dict.fromkeys(activities, queues), **({"order": queues if served else ()} if announced else {})},
        worker=worker,
        mail=letters,
        children=children or {},
        held=held,
    )
    return why(of, NOW, around)


def test_an_open_transaction_that_holds_the_run() -> None:
    wait = Wait(kind="sleep", step="nap", since=NOW - 5 * SECOND, until=NOW + 3600 * SECOND)
    quiet, told = said(row("waiting", wait)), said(row("waiting", wait), held=True)
    assert told == (
        f"{quiet} An open transaction holds it, a transaction step's of its own or one that has signalled it: "
        "it ends only after that."
    )


def test_a_sleep() -> None:
    wait = Wait(kind="sleep", step="cool-off", since=NOW - 5 * SECOND, until=NOW + 3600 * SECOND, site="shop.py:9")
    assert said(row("waiting", wait)) == (
        'Run o-1 sleeps in "cool-off" (shop.py:9) since 5 s, until 2027-01-15 09:00:00 UTC (in 1 h); '
        "only time, or a cancel, moves it."
    )


def test_a_sleep_that_is_over() -> None:
    wait = Wait(kind="sleep", step="cool-off", since=NOW - 65 * SECOND, until=NOW - 5 * SECOND)
    assert said(row("waiting", wait), served=False) == (
        'Run o-1 sleeps in "cool-off" since 1 min 5 s, until 2027-01-15 07:59:55 UTC (due since 5 s); '
        'a worker that serves it takes it at its next look. No worker that serves "order" lives now.'
    )


def test_a_signal() -> None:
    wait = Wait(kind="signal", step="wait", name="approval", since=NOW - 5 * SECOND, site="shop.py:9")
    assert said(row("waiting", wait)) == (
        'Run o-1 waits in "wait" (shop.py:9) for signal "approval" since 5 s, without a timeout; '
        "whoever sends it moves the run: `perdure signal o-1 approval`."
    )


def test_a_signal_with_a_timeout() -> None:
    wait = Wait(kind="signal", step="approval", name="approval", since=NOW, until=NOW + 86_400 * SECOND)
    assert said(row("waiting", wait)) == (
        'Run o-1 waits in "approval" for signal "approval" since 0 ms, until 2027-01-16 08:00:00 UTC; '
        "whoever sends it moves the run: `perdure signal o-1 approval`."
    )


def test_a_child() -> None:
    wait = Wait(kind="child", step="pack", name="pack", run="o-1/pack", since=NOW - 5 * SECOND)
    assert said(row("waiting", wait), children={"o-1/pack": row("running")}) == (
        'Run o-1 waits in "pack" for child run o-1/pack, which is running, since 5 s; see `perdure why o-1/pack`.'
    )


def test_an_activity_that_somebody_serves() -> None:
    wait = Wait(kind="activity", step="render", name="render", run="o-1/render", since=NOW - 5 * SECOND)
    assert said(row("waiting", wait), activities=("render",)) == (
        'Run o-1 waits in "render" for activity "render" since 5 s; a worker of its queue moves it.'
    )


def test_an_activity_that_nobody_serves() -> None:
    wait = Wait(kind="activity", step="render", name="render", run="o-1/render", since=NOW - 5 * SECOND)
    assert said(row("waiting", wait)) == (
        'Run o-1 waits in "render" for activity "render" since 5 s; no living worker serves it: start one.'
    )


def test_a_retry() -> None:
    wait = Wait(
        kind="retry",
        step="charge",
        since=NOW - 5 * SECOND,
        until=NOW + 55 * SECOND,
        attempt=3,
        attempts=5,
        error="ConnectionError: refused",
        site="shop.py:9",
    )
    assert said(row("waiting", wait)) == (
        'Run o-1 waits to try step "charge" (shop.py:9) again, attempt 3 of 5, in 55 s; the last attempt failed with '
        "ConnectionError: refused; only time, or a cancel, moves it."
    )


def test_a_timer_of_the_code() -> None:
    wait = Wait(kind="timer", since=NOW, until=NOW + 2 * SECOND)
    assert said(row("waiting", wait)) == (
        "Run o-1 waits for a timer of its own code until 2027-01-15 08:00:02 UTC (in 2 s); only time moves it."
    )


def test_nothing_that_can_come() -> None:
    assert said(row("waiting", Wait(kind="nothing", since=NOW - 5 * SECOND))) == (
        "Run o-1 waits for nothing that can come, since 5 s: its code awaits an asyncio object that nothing of it "
        "will ever set; terminate it and mend the code."
    )


def test_several_things() -> None:
    sleep = Wait(kind="sleep", step="a", since=NOW, until=NOW + SECOND)
    column = waits_text(Waits(waits=[sleep, Wait(kind="signal", step="b", name="b")], more=3))
    assert said(row("waiting", column=column)).endswith("It waits for 4 more things beside.")


@pytest.mark.parametrize("status", ["running", "waiting", "ready", "blocked"])
def test_a_timeout_of_the_run_is_told_beside_what_it_waits_for(status: str) -> None:
    ends = {"deadline_at": NOW + 60 * SECOND}
    last = " Its timeout ends it at 2027-01-15 08:01:00 UTC (in 1 min)."
    assert said(row(status, **ends)) == said(row(status)) + last
    ended = row("completed", ended_at=NOW)
    assert said(row("completed", ended_at=NOW, **ends)) == said(ended)


def test_ids_that_look_like_options_stand_behind_all_options() -> None:
    wait = Wait(kind="signal", step="approval", name="approval", since=NOW)
    assert said(row("waiting", wait, id="--help me")).endswith("`perdure signal -- '--help me' approval`.")


def test_a_cancellation_that_is_ignored() -> None:
    column = waits_text(Waits(waits=[Wait(kind="sleep", step="a", since=NOW, until=NOW + SECOND)], cancel="too late"))
    assert said(row("waiting", column=column)).endswith(
        'It was asked to cancel ("too late") and has not ended: its code ignores that or is cleaning up.'
    )


def test_a_message_that_nobody_reads() -> None:
    wait = Wait(kind="signal", step="approval", name="approval", since=NOW)
    assert said(row("waiting", wait), served=False, mail=1) == (
        'Run o-1 has 1 unread message, but no worker that serves "order" lives now; start one with '
        "`perdure worker MODULE`."
    )


def test_code_that_did_not_rest() -> None:
    of = row("waiting", column=waits_text(Waits(restless="shop.py:9")), wake_at=NOW + 5 * SECOND)
    assert said(of) == (
        "Run o-1 was interrupted because its code did not rest (shop.py:9); it is tried again in 5 s; "
        "put what takes long into a step."
    )


def test_a_step_that_runs() -> None:
    wait = Wait(kind="step", step="charge", attempt=2, attempts=3, since=NOW - 8 * SECOND, site="shop.py:9")
    assert said(row("running", wait, owner="x"), worker="desk:7") == (
        'Run o-1 is running step "charge" (shop.py:9), attempt 2 of 3, in worker desk:7 since 8 s; '
        "it goes on when the step's function returns."
    )


def test_a_step_whose_worker_died() -> None:
    wait = Wait(kind="step", step="charge", attempt=2, since=NOW - 8 * SECOND)
    assert said(row("running", wait, owner="x")) == (
        'Run o-1 was running step "charge", attempt 2, in a worker that no longer answers; '
        "another worker takes the run over when that one is known to be dead, and repeats the step."
    )


def test_code_that_runs() -> None:
    assert said(row("running", owner="x"), worker="desk:7") == (
        "Run o-1 is being executed by worker desk:7; nothing has to be done."
    )


def test_a_worker_that_died() -> None:
    assert said(row("running", owner="x")) == (
        "Run o-1 was being executed by a worker that no longer answers; "
        "another worker takes it over when that one is known to be dead."
    )


def test_room_in_a_worker() -> None:
    assert said(row("ready")) == (
        'Run o-1 waits for room in a worker since 1 min 30 s: workers serve "order", '
        'and one that serves queue "default" takes it; more workers would take it sooner.'
    )


def test_no_living_worker() -> None:
    assert said(row("ready"), served=False) == (
        'Run o-1 waits for a worker since 1 min 30 s: none that serves workflow "order" lives now; '
        "start one with `perdure worker MODULE`."
    )


def test_a_queue_that_nobody_serves() -> None:
    assert said(row("ready", queue="fast"), queues=("slow", "default")) == (
        'Run o-1 waits for a worker since 1 min 30 s: workers that serve "order" live, but none of them takes from '
        'queue "fast" (they take from "default", "slow"); start one with `perdure worker MODULE --queue fast`.'
    )


def test_a_suspect_on_a_queue_that_nobody_serves() -> None:
    assert "takes from queue" in said(row("ready", queue="fast", strikes=2))


def test_mail_for_a_run_on_a_queue_that_nobody_serves() -> None:
    assert said(row("waiting", queue="fast"), mail=1) == (
        'Run o-1 has 1 unread message: workers that serve "order" live, but none of them takes from queue "fast" '
        '(they take from "default"); start one with `perdure worker MODULE --queue fast`.'
    )


def test_a_wait_of_a_run_on_a_queue_that_nobody_serves() -> None:
    wait = Wait(kind="signal", step="approval", name="approval", since=NOW)
    assert said(row("waiting", wait, queue="fast")).endswith(
        ' No living worker that serves "order" takes from its queue "fast".'
    )


def test_an_activity_on_a_queue_that_nobody_serves() -> None:
    wait = Wait(kind="activity", step="far", name="resize", since=NOW, run="o-1/far")
    far = row("ready", id="o-1/far", kind="activity", workflow="resize", queue="gpu")
    assert said(row("waiting", wait), children={"o-1/far": far}, activities=("resize",)) == (
        'Run o-1 waits in "far" for activity "resize" since 0 ms: workers that serve "resize" live, but none of them '
        'takes from queue "gpu" (they take from "default"); start one with `perdure worker MODULE --queue gpu`.'
    )


def test_a_begun_run_without_a_worker() -> None:
    assert said(row("ready", started_at=NOW - 60 * SECOND), served=False) == (
        'Run o-1, begun 1 min ago, waits for another worker: none that serves workflow "order" lives now; '
        "start one with `perdure worker MODULE`."
    )


def test_a_name_that_nobody_knows() -> None:
    assert said(row("ready"), served=False, announced=False) == (
        'Run o-1 waits for a worker since 1 min 30 s: nobody has ever announced workflow "order"; '
        "start a worker that serves it."
    )


def test_a_run_that_must_be_alone() -> None:
    assert said(row("ready", strikes=2, started_at=NOW - 60 * SECOND)) == (
        "Run o-1, begun 1 min ago, waits to be executed alone, because it killed its worker 2 times; "
        "a worker gives it a process of its own, an engine takes it when nothing else of its is executing."
    )


def test_a_later_start() -> None:
    assert said(row("scheduled", wake_at=NOW + 2 * 86_400 * SECOND)) == (
        "Run o-1 starts at 2027-01-17 08:00:00 UTC, in 2 d; cancel it to stop that."
    )


def test_a_limit() -> None:
    assert said(row("held")) == "Run o-1 is held by a limit since 1 min 30 s; it goes on when a slot is free."


def test_a_difference_is_told_as_its_whole_report() -> None:
    report = "run o-1 cannot be replayed at step a.\n  recorded: event 2, sleep\n  now asks: signal"
    assert said(row("blocked", column=waits_text(Waits(blocked=report, tries=2)))) == report


def test_quarantine() -> None:
    assert said(row("quarantined", strikes=3)) == (
        "Run o-1 is quarantined: it killed its worker 3 times, the last time executed alone; "
        "mend its code, then terminate it and start anew."
    )


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "terminated", "timed_out"])
def test_an_end(status: str) -> None:
    assert said(row(status, ended_at=NOW)) == (
        f"Run o-1 has ended: it is {status.replace('_', ' ')} since 2027-01-15 08:00:00 UTC, nothing can move it."
    )
