"""The blocking face where it cannot answer: after its end, and in a forked child."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from perdure import Context, sync, workflow
from tests.integration.helpers import url_of


@workflow
async def double(ctx: Context, value: int) -> int:
    return value * 2


def test_what_was_closed_says_so(tmp_path: Path) -> None:
    with sync.Engine(url_of(tmp_path), workflows=[double]) as it:
        run = it.start(double, 1)
        assert run.result(timeout=60) == 2
    it.close()
    for ask in (lambda: it.start(double, 2), run.result, run.info, it.counts):
        with pytest.raises(RuntimeError, match="was closed"):
            ask()


def _asks(it: sync.Engine, answers: Any) -> None:
    try:
        it.start(double, 2)
    except RuntimeError as error:
        answers.send(str(error))


def test_a_forked_child_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with sync.Engine(url_of(tmp_path), workflows=[double]) as it:
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_asks, args=(it, theirs))
        child.start()
        try:
            assert ours.poll(10), "the child hangs"
            assert "another process" in ours.recv()
        finally:
            child.kill()
            child.join()
        assert it.start(double, 4).result(timeout=60) == 8
