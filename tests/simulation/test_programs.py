"""Thousands of random programs, played on tapes of inputs: replay is life again, and a changed program is judged.

Every failure names its seed: `show(seed)` below prints the program.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from perdure.core import events as ev
from perdure.testing import programs, tape
from perdure.testing.changes import change
from perdure.testing.programs import Program, program, tree
from perdure.testing.tape import Beat, Tape

pytestmark = [
    # Untidy on purpose: tasks that nobody retrieves, coroutines that nobody awaits.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BLOCK = 500


def show(seed: int) -> str:
    """The program of a seed, for a failed test."""
    drawn = program(seed)
    return f"seed {seed}, {drawn.style}\n{tree(drawn.body)}"


def lived(seed: int) -> Tape:
    return tape.live(program(seed), seed * 7 + 1)


def history_of_some(first: int, count: int) -> str:
    """One name for the histories of many programs."""
    texts: list[str] = []
    for seed in range(first, first + count):
        life = lived(seed)
        texts += life.texts()
        tape.shut(life.play)
    return tape.fingerprint(texts)


@pytest.mark.parametrize("block", range(6))
def test_replay_of_every_prefix_stands_where_life_stood(block: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        life = lived(seed)
        for count, beat in enumerate(life.beats, start=1):
            play = tape.replayed(life.program, life.events(count))
            assert tape.position(play) == beat.position, show(seed)
            if count > 1:
                assert not play.take().commands, show(seed)
            tape.shut(play)
        ends[life.end[0] if life.end else "open"] += 1
        tape.shut(life.play)
    assert not programs.ANSWERED_WHILE_CLOSING
    # Random programs that all ended the same way would prove little.
    assert min(ends["completed"], ends["failed"], ends["cancelled"]) > 50, ends


def test_a_run_evicted_anywhere_goes_on_alike_when_it_is_rebuilt() -> None:
    for seed in range(3000, 4000):
        life = lived(seed)
        rng = random.Random(seed)
        play = life.play
        tape.shut(play)
        place = 0
        while place < len(life.beats):
            # Life, with an eviction before some inputs.
            place = min(place + rng.randint(1, 4), len(life.beats))
            play = tape.replayed(life.program, life.events(place))
            play.take()
            for beat in life.beats[place : place + rng.randint(0, 6)]:
                if rng.random() < 0.3:
                    play.unwind()
                play.deliver(beat.input)
                assert list(play.take().commands) == beat.commands, show(seed)
                assert tape.position(play) == beat.position, show(seed)
            tape.shut(play)


def test_histories_depend_on_no_hash_seed() -> None:
    command = "import sys; from tests.simulation.test_programs import history_of_some as h; print(h(100, 200))"
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", command],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(5)
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 32


def test_histories_do_not_depend_on_when_the_collector_runs() -> None:
    expected = history_of_some(0, 60)
    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(7, 2, 2)
        assert history_of_some(0, 60) == expected
        gc.disable()
        assert history_of_some(0, 60) == expected
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)


# --- deploys ------------------------------------------------------------------------------------------


def judged(changed: Program, old: Tape, beats: int, rng: random.Random) -> str:
    """Bring a changed program to the end of an old history, and let it live on: `blocked`, or `fine`."""
    play = tape.replayed(changed, old.events(beats))
    if play.difference is not None:
        again = tape.replayed(changed, old.events(beats))
        assert again.difference == play.difference
        assert play.end is None
        tape.shut(again)
        tape.shut(play)
        return "blocked"
    new = Tape(
        program=changed,
        play=play,
        beats=[Beat(input=b.input, commands=[*b.commands], position=None) for b in old.beats[:beats]],
    )
    new.beats[-1].commands.extend(play.take().commands)
    now = play.line.now
    if play.line.deferred and not play.over:
        tape.give(new, ev.Resumed(at=now))
    signals = 100
    while not play.over and len(new.beats) < beats + 12:
        event, now = tape.draw(play, rng, now, signals)
        if event is None:
            break
        signals += isinstance(event, ev.Signal)
        tape.give(new, event)
    assert play.difference is None
    for count in range(beats + 1, len(new.beats) + 1):
        later = tape.replayed(changed, new.events(count))
        # What a replay found new has its place in the order of ends where it first stood, no sooner.
        assert tape.position(later) == new.beats[count - 1].position
        tape.shut(later)
    tape.shut(play)
    return "fine"


def test_a_changed_program_is_blocked_or_lives_on_in_a_history_that_replays() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for seed in range(1000):
        rng = random.Random(seed)
        life = lived(seed)
        tape.shut(life.play)
        for _ in range(2):
            changed, what = change(life.program, rng)
            beats = rng.randint(1, len(life.beats))
            try:
                verdict = judged(changed, life, beats, rng)
            except AssertionError as error:
                raise AssertionError(f"{what} at {beats}\n{show(seed)}\n---\n{tree(changed.body)}") from error
            found[what, verdict] += 1
    assert found["same", "blocked"] == 0
    assert found["guarded", "blocked"] == 0
    for what in ("renamed", "removed", "inserted step", "inserted sleep", "inserted emit", "branch"):
        assert found[what, "fine"] > 5, found
        assert found[what, "blocked"] > 5, found
