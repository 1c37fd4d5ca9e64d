"""The short form of every scenario of `make chaos`, and the teeth of its audit."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from chaos import facts as facts_
from chaos.audit import CHECKERS, Promised, violations
from chaos.facts import Facts
from chaos.load import Load
from chaos.run import PLAYABLE, SCENARIOS, run
from chaos.sqlite import SQLiteBase
from chaos.stage import Report, Stage
from perdure import Client

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
ELSEWHERE = {
    # test_kill.py plays these on SQLite for longer; what an open transaction does there, `lock` shows.
    "sqlite": {"kill", "pause", "replace", "open"},
    # The store makes no difference to them, or none that is worth its seconds here; `make chaos` plays all on both.
    "postgres": {"hold", "restart", "timers", "poison", "memory", "migrations", "disk", "clock"},
}
SHORT = [(name, store) for name, store in PLAYABLE if name not in ELSEWHERE[store]]


@pytest.mark.parametrize(("name", "store"), SHORT, ids=lambda each: each)
def test_a_scenario_violates_nothing(name: str, store: str) -> None:
    seed = int(os.environ.get("PERDURE_SEED", random.SystemRandom().randrange(1 << 32)))
    report = run(BY_NAME[name], store, "short", seed)
    print(report.text())
    if report.skipped:
        assert os.environ.get("PERDURE_REQUIRE_SERVICES") != "1", report.skipped
        pytest.skip(report.skipped)
    assert report.violations == []


def test_a_step_that_keeps_the_loop_of_its_worker_keeps_no_other_run(tmp_path: Path) -> None:
    stage = Stage(SQLiteBase(tmp_path), tmp_path, Report(scenario="spins", store="sqlite", size="short", seed=1))
    stage.base.prepare()

    async def play() -> None:
        await stage.workers(1, lease=1)
        async with Client(stage.base.url) as client:
            load = Load(stage, client)
            await load.start("long_step", 0.5, id="innocent")
            await stage.until(lambda: stage.lines(step="long"), "the innocent step")
            await load.start("spins", str(tmp_path / "spun"), id="spins")
            await stage.until(lambda: stage.lines(step="deadly"), "the step that spins")
            await stage.workers(1, lease=1)
            for run in ("innocent", "spins"):
                await client.handle(run).result(timeout=30)

    try:
        asyncio.run(play())
    finally:
        stage.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Promised]:
    """What a few ordinary runs leave behind."""
    folder = tmp_path_factory.mktemp("audit")
    stage = Stage(SQLiteBase(folder), folder, Report(scenario="audit", store="sqlite", size="short", seed=1))
    stage.base.prepare()

    async def play() -> None:
        await stage.workers(1)
        async with Client(stage.base.url) as client:
            load = Load(stage, client)
            await asyncio.gather(*(load.one() for _ in range(12)))
            await stage.healed()
        await stage.leave()

    try:
        asyncio.run(play())
    finally:
        stage.close()
    facts = stage.base.facts()
    facts.begun, facts.ended = facts_.ledger(stage.ledger, "begin"), facts_.ledger(stage.ledger, "end")
    assert violations(facts, stage.promised) == []
    return facts, stage.promised


def _an_order(facts: Facts) -> int:
    return next(key for key, row in facts.runs.items() if row["workflow"] == "order")


def _event(facts: Facts, kind: str) -> dict[str, object]:
    return next(event for event in facts.history[_an_order(facts)] if event["kind"] == kind)


def _an_event_disappears(facts: Facts, promised: Promised) -> None:
    del facts.history[_an_order(facts)][3]


def _a_second_end(facts: Facts, promised: Promised) -> None:
    history = facts.history[_an_order(facts)]
    history.append({**history[-1], "seq": len(history) + 1})


def _a_second_outcome(facts: Facts, promised: Promised) -> None:
    facts.history[_an_order(facts)].append(_event(facts, "step_completed"))


def _a_late_beginning(facts: Facts, promised: Promised) -> None:
    facts.begun[0] = replace(facts.begun[0], epoch=facts.begun[0].epoch + 1)


def _an_execution_nobody_explains(facts: Facts, promised: Promised) -> None:
    facts.begun.append(facts.begun[0])


def _a_commit_without_its_version(facts: Facts, promised: Promised) -> None:
    fences = facts.fences[_an_order(facts)]
    fences[-1] = replace(fences[-1], version=fences[-1].version + 1)


def _a_start_is_gone(facts: Facts, promised: Promised) -> None:
    promised.started.append("nobody")


def _a_signal_is_gone(facts: Facts, promised: Promised) -> None:
    promised.signalled.append((promised.started[0], "nothing"))


def _a_signal_twice(facts: Facts, promised: Promised) -> None:
    facts.history[_an_order(facts)].append(_event(facts, "signal"))


def _a_timer_too_early(facts: Facts, promised: Promised) -> None:
    _event(facts, "sleep")["due"] = 1 << 60


def _a_row_nobody_recorded(facts: Facts, promised: Promised) -> None:
    facts.rows[promised.started[0], "pay"] += 1


def _an_attempt_too_many(facts: Facts, promised: Promised) -> None:
    facts.begun[0] = replace(facts.begun[0], attempt=5)


def _an_innocent_in_quarantine(facts: Facts, promised: Promised) -> None:
    facts.runs[_an_order(facts)]["status"] = "quarantined"


def _a_run_that_never_ends(facts: Facts, promised: Promised) -> None:
    facts.runs[_an_order(facts)].update(status="waiting", ended_at=None)


def _a_dead_owner(facts: Facts, promised: Promised) -> None:
    facts.runs[_an_order(facts)]["owner"] = next(iter(facts.workers))


BROKEN: dict[Callable[[Facts, Promised], None], str] = {
    _an_event_disappears: "INV-1",
    _a_second_end: "INV-2",
    _a_second_outcome: "INV-3",
    _a_late_beginning: "INV-4",
    _an_execution_nobody_explains: "INV-5",
    _a_commit_without_its_version: "INV-6",
    _a_start_is_gone: "INV-7",
    _a_signal_is_gone: "INV-7",
    _a_signal_twice: "INV-10",
    _a_timer_too_early: "INV-11",
    _a_row_nobody_recorded: "INV-15",
    _an_attempt_too_many: "INV-16",
    _an_innocent_in_quarantine: "INV-20",
    _a_run_that_never_ends: "INV-23",
    _a_dead_owner: "INV-25",
}


@pytest.mark.parametrize(("breaks", "id"), BROKEN.items(), ids=lambda each: getattr(each, "__name__", each).strip("_"))
def test_the_audit_sees(sound: tuple[Facts, Promised], breaks: Callable[[Facts, Promised], None], id: str) -> None:
    facts, promised = deepcopy(sound)
    breaks(facts, promised)
    assert id in {each.split(":")[0] for each in violations(facts, promised)}


def test_every_scenario_has_a_short_form() -> None:
    assert {name for name, _ in SHORT} == set(BY_NAME)


def test_every_checker_has_something_it_must_see() -> None:
    assert set(BROKEN.values()) == set(CHECKERS)


def test_the_folder_of_a_scenario_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(BY_NAME["migrations"], "sqlite", "short", 1)
    assert list(tmp_path.iterdir()) == []
