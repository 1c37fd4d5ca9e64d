"""A run that killed two workers has a process of its own: what it does there, it does to nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from perdure import Client, RunHandle
from tests.e2e.processes import ROOT, Site, ended, until


async def begun(site: Site, client: Client, workflow: str, *input: object) -> RunHandle[object]:
    """A run that its worker has begun to execute."""
    await site.serving(site.worker())
    return await client.start(workflow, *input)


async def struck_twice(site: Site) -> None:
    """Let a run kill the worker that has it, and the next."""
    await ended(site.processes[-1])
    await ended(site.worker())


async def test_a_run_that_segfaults_three_workers_is_quarantined_while_others_go_on_in_the_third(site: Site) -> None:
    async with Client(site.url) as client:
        poison = await begun(site, client, "falls")
        await struck_twice(site)
        assert [process.returncode for process in site.processes] == [-signal.SIGSEGV] * 2
        release = site.folder / "release"
        busy = await client.start("held_step", str(release))
        worker = site.worker()
        await site.serving(worker)
        quick = 0
        while await poison.status() != "quarantined":
            run = await client.start("quick", quick)
            assert await run.result(timeout=60) == quick + 2
            quick += 1
        # It was never idle, and took no pause for the run that it had not to touch.
        assert not site.ledger("end", step="long")
        release.touch()
        assert await busy.result(timeout=60) == str(worker.pid)
        assert "the last time executed alone" in await poison.why()
        assert worker.poll() is None
        pids = [line.pid for line in site.ledger(step="deadly")]
        assert len(set(pids)) == len(pids) == 3
        assert worker.pid not in pids
        worker.send_signal(signal.SIGTERM)
        assert await ended(worker) == 0
    print(f"{quick} runs in the worker while the third try came to its end")
    assert quick > 1


async def test_a_suspect_that_loops_for_ever_hurts_its_own_process_alone_which_ends_with_the_worker(site: Site) -> None:
    async with Client(site.url) as client:
        looping = await begun(site, client, "spins_at_last")
        await struck_twice(site)
        other = await client.start("slow_poison", 2)
        for _ in range(2):
            assert await ended(site.worker(grace=0.2)) == 9
        worker = site.worker(grace=0.2)
        await until(lambda: len(site.ledger(step="deadly", run=other.id)) == 3, "the other suspect's third try")
        await other.signal("go")
        assert await other.result(timeout=60) == "survived"
        run = await client.start("quick", 1)
        assert await run.result(timeout=60) == 3
        tries = await until(lambda: site.ledger(step="deadly", run=looping.id)[2:], "the looping one's third try")
        worker.kill()
        await ended(worker)
        await until(lambda: not alive(tries[-1].pid), "the end of the process whose worker is gone")
        # It was handed back: not its fault that the worker was killed.
        assert site.ask("SELECT strikes, status FROM perdure_runs WHERE id = ?", looping.id) == [(2, "ready")]


async def test_a_worker_that_is_asked_to_stop_lets_its_suspect_end_its_step(site: Site) -> None:
    async with Client(site.url) as client:
        slow = await begun(site, client, "slow_at_last", 1.0)
        await struck_twice(site)
        worker = site.worker()
        third = (await until(lambda: site.ledger(step="deadly")[2:], "the third try"))[0].pid
        worker.send_signal(signal.SIGTERM)
        assert await ended(worker) == 0
        assert not alive(third)
        assert [line.pid for line in site.ledger("end", step="deadly")] == [third]
        assert await slow.status() == "ready"
        assert site.ask("SELECT strikes, owner FROM perdure_runs") == [(0, None)]
        next_one = site.worker()
        assert await slow.result(timeout=60) == str(next_one.pid)
    assert len(site.ledger(step="deadly")) == 3


async def test_a_worker_whose_grace_runs_out_gives_its_suspect_back_without_a_strike(site: Site) -> None:
    async with Client(site.url) as client:
        looping = await begun(site, client, "spins_at_last")
        await struck_twice(site)
        worker = site.worker(grace=0.2)
        third = (await until(lambda: site.ledger(step="deadly")[2:], "the third try"))[0].pid
        worker.send_signal(signal.SIGTERM)
        assert await ended(worker) == 1
        assert not alive(third)
        assert await looping.status() == "ready"
        assert site.ask("SELECT strikes FROM perdure_runs") == [(2,)]


FLOWS = """
import os
from perdure import Context, workflow

def die() -> None:
    os._exit(9)

@workflow
async def dies(ctx: Context) -> None:
    await ctx.step.run("die", die)
"""


async def test_the_command_gives_a_run_of_a_file_a_process_of_its_own(site: Site) -> None:
    file = site.folder / "queue.py"  # a name that an import would find elsewhere
    file.write_text(FLOWS, encoding="utf-8")

    def worker() -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "perdure", "worker", str(file), "--store", site.url]
        with open(site.folder / "workers.log", "ab") as log:
            process = subprocess.Popen(line, cwd=ROOT, stderr=log)
        site.processes.append(process)
        return process

    async with Client(site.url) as client:
        first = worker()
        await until(lambda: site.ask("SELECT 1 FROM perdure_workers"), "the worker")
        poison = await client.start("dies")
        assert await ended(first) == 9
        assert await ended(worker()) == 9
        last = worker()
        await until(lambda: site.ask("SELECT 1 FROM perdure_runs WHERE status = 'quarantined'"), "the quarantine")
        assert "executed alone" in await poison.why()
        last.send_signal(signal.SIGINT)
        assert await ended(last) == 0
    assert "Traceback" not in site.log()


def alive(pid: int) -> bool:
    """Whether the process lives; one that has ended and that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return sys.platform != "linux"
    except ProcessLookupError:
        return False
    return state != "Z"
