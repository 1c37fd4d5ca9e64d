"""Random programs on random schedules of a worker: late answers, fences, newer mail, eviction, crashes.

A `Service` checks while it runs: nothing begins before its cause is acknowledged or after its outcome is, every
commit replays cold to where the run stands, and no parked run would sleep past its next timer.
"""

from __future__ import annotations

from collections import Counter

import pytest

from perdure.core import stored
from perdure.testing import tape
from perdure.testing.programs import program, tree
from perdure.testing.service import Broken, played_again, random_life

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_one_input_per_turn_or_many_give_the_same_history() -> None:
    for seed in range(400):
        drawn = program(seed)
        # Workers deliver whatever arrives; the tape must end where nothing is due at its last instant.
        life = tape.live(drawn, seed * 7 + 1, unwinding=False)
        tape.shut(life.play)
        expected = [stored.decode(text) for text in life.texts()]
        for patience in (0.0, 0.5, 0.9):
            found = [stored.decode(text) for text in played_again(life, seed, patience=patience)]
            assert found == expected, f"seed {seed}\n{tree(drawn.body)}"


@pytest.mark.parametrize("block", range(4))
def test_no_schedule_of_faults_breaks_a_promise(block: int) -> None:
    sometimes: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for seed in range(block * 60, block * 60 + 60):
        programs = [program(seed * 3 + n) for n in range(3)]
        try:
            service = random_life(programs, seed)
        except (Broken, Exception) as error:
            raise AssertionError("\n\n".join([f"universe {seed}", *(tree(p.body) for p in programs)])) from error
        sometimes += service.sometimes
        ends.update(row.status for row in service._rows().values())
    # What never happened was not tested.
    for what in ("crash", "rob", "signal", "cancel", "Committed", "Fenced", "MoreMail"):
        assert sometimes[what] > 0, sometimes
    assert min(ends["completed"], ends["failed"], ends["cancelled"]) > 0, ends
