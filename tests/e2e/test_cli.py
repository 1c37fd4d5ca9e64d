"""The `perdure` command as a shell sees it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from perdure import RunInfo
from perdure.cli.command import COMMANDS
from perdure.cli.command import run as in_process
from perdure.testing import sim

PATIENCE = 60.0
FLOWS = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from perdure import Context, NonRetryable, workflow

@dataclass
class Order:
    id: str
    cents: int

def hold(seconds: float) -> str:
    Path(f"holding-{os.getpid()}").touch()
    time.sleep(seconds)
    return "held"

async def clog() -> None:
    Path(f"holding-{os.getpid()}").touch()
    time.sleep(60)  # blocks the worker's own loop

def refuse(text: str) -> None:
    raise NonRetryable(text)

@workflow
async def greet(ctx: Context, name: str, times: int = 1) -> str:
    return await ctx.step.run("greeting", lambda: f"Hello, {name}!" * times)

@workflow
async def order(ctx: Context, order: Order) -> dict[str, object]:
    cents = await ctx.step.run("charge", lambda: order.cents)
    approval = await ctx.step.wait_signal("approval")
    return {"cents": cents, "approval": approval}

@workflow
async def fails(ctx: Context, text: str) -> None:
    await ctx.step.run("refuse", refuse, text)

@workflow
async def holds(ctx: Context, seconds: float) -> str:
    return await ctx.step.run("hold", hold, seconds)

@workflow
async def clogs(ctx: Context) -> None:
    await ctx.step.run("clog", clog)
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """A folder with `flows.py`, in which the command is given."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "flows.py").write_text(FLOWS)

    def ask(self, *arguments: str) -> Said:
        """In this process: for all but `run` and `worker`."""
        self.capsys.readouterr()
        code = in_process(arguments)
        out, err = self.capsys.readouterr()
        return Said(code, out, err)

    def do(self, *arguments: str, input: str | None = None) -> Said:
        """In a process of its own, to its end."""
        line = [sys.executable, "-m", "perdure", *arguments]
        done = subprocess.run(
            line, cwd=self.folder, input=input, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """In a process of its own, which goes on; its stderr is in `log`."""
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "perdure", *arguments],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def json(self, *arguments: str) -> Any:
        said = self.ask(*arguments, "--json")
        assert said.code == 0, said.err
        return json.loads(said.out)

    def waiting(self, run: str = "o-1", *more: str) -> None:
        """Bring a run of `order` to its wait for a signal."""
        said = self.do("run", "flows.py:order", "--id", run, "--input", '{"id": "o", "cents": 42}', "--timeout", "0.2")
        assert said.code == 5, said.err

    def holding(self) -> int:
        """The process in which a step holds now."""
        found = until(lambda: list(self.folder.glob("holding-*")))[0]
        found.unlink()
        return int(found.name.partition("-")[2])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, capsys)
    yield shell
    shell.close()


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# --- run


def test_run_prints_the_result_on_stdout_and_the_steps_on_stderr(shell: Shell) -> None:
    said = shell.do("run", "flows:greet", "--input", '"you"', "--arg", "times=2", "--id", "g")
    assert said.code == 0
    assert said.out == '"Hello, you!Hello, you!"\n'
    assert "run g of workflow greet begins\n  + greeting: done\nrun g completed after" in said.err


def test_arguments_come_from_files_and_stdin_too(shell: Shell) -> None:
    (shell.folder / "name.json").write_text('"file"\n')
    assert shell.do("run", "flows.py:greet", "--input", "@name.json").out == '"Hello, file!"\n'
    assert shell.do("run", "flows.py:greet", "--arg", "name=-", input='"stdin"').out == '"Hello, stdin!"\n'


def test_run_with_json_prints_the_run(shell: Shell) -> None:
    said = shell.do("run", "flows.py:greet", "--input", '"you"', "--json")
    made = json.loads(said.out)
    assert list(made) == list(RunInfo.__dataclass_fields__)
    assert (made["status"], made["result"]) == ("completed", "Hello, you!")


def test_a_failed_run_is_exit_1_and_shows_its_error(shell: Shell) -> None:
    said = shell.do("run", "flows.py:fails", "--id", "f", "--input", '"no \\u001b[31m card"')
    assert (said.code, said.out) == (1, "")
    assert 'Run "f" failed.' in said.err
    assert "\x1b" not in said.err, "control characters are shown, not sent"
    shown = shell.ask("show", "f")
    assert "Traceback" in shown.out
    step, run = shown.out.split('step "refuse", attempt 1:')[1].split("in fails", 1)
    assert "in refuse" in step, "where the step's own function raised"
    assert run
    assert "in refuse" in shell.json("show", "f")["steps"][0]["failures"][0]["traceback"]
    assert "\x1b" not in shown.out
    assert shell.ask("result", "f").code == 1
    for again in (
        shell.ask("result", "f", "--json"),
        shell.do("run", "flows.py:fails", "--id", "f2", "--input", '"no"', "--json"),
    ):
        assert again.code == 1
        assert json.loads(again.out)["status"] == "failed"
    twice = shell.ask("list", "--status", "failed", "--status", "completed")
    assert (twice.code, twice.out) == (2, "")
    assert "more than once" in twice.err


def test_a_run_that_is_interrupted_says_how_to_go_on(shell: Shell) -> None:
    process = shell.begin("run", "flows.py:order", "--input", '{"id": "o", "cents": 42}')
    until(lambda: "approval: waits" in shell.log)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    proposed = shlex.split(shell.log.partition("goes on with: ")[2])
    run = proposed[proposed.index("--id") + 1]
    assert shell.ask("signal", run, "approval", "--input", "7").code == 0
    said = shell.do(*proposed[1:])
    assert said.code == 0
    assert json.loads(said.out) == {"cents": 42, "approval": 7}
    assert "goes on" in said.err
    assert "= charge: done" in said.err


def test_how_to_go_on_is_said_before_steps_in_flight_are_waited_for(shell: Shell) -> None:
    process = shell.begin("run", "flows.py:holds", "--input", "60")
    shell.holding()
    process.send_signal(signal.SIGINT)
    until(lambda: "goes on with: perdure run flows.py:holds" in shell.log)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130


def test_a_run_that_is_killed_goes_on(shell: Shell) -> None:
    process = shell.begin("run", "flows.py:holds", "--id", "h", "--input", "0.5")
    assert shell.holding() == process.pid
    process.kill()
    process.wait(PATIENCE)
    said = shell.do("run", "flows.py:holds", "--id", "h", "--input", "0.5")
    assert (said.code, said.out) == (0, '"held"\n')


def test_a_run_that_has_ended_before_is_shown_once_as_it_is(shell: Shell) -> None:
    line = ["run", "flows.py:greet", "--id", "g", "--input", '"Ada"']
    shell.do(*line)
    said = shell.do(*line)
    assert (said.code, said.out) == (0, '"Hello, Ada!"\n')
    assert said.err == "run g of workflow greet has ended before: it is completed\n  = greeting: done\n"


def test_what_a_run_waited_for_when_it_was_ended_is_not_shown_as_if_it_waited(shell: Shell) -> None:
    line = ["run", "flows.py:order", "--id", "o-1", "--input", '{"id": "o", "cents": 42}']
    assert shell.do(*line, "--timeout", "0.2").code == 5
    assert shell.ask("terminate", "o-1").code == 0
    said = shell.do(*line)
    assert said.code == 1
    assert "  = approval: ended with its run\n" in said.err


KIDS = """
from perdure import Context, Retry, workflow

def breaks() -> None:
    raise ValueError("no such card")

@workflow
async def child(ctx: Context) -> None:
    await ctx.step.options(retry=Retry(max_attempts=1)).run("pay", breaks)

@workflow
async def parent(ctx: Context) -> None:
    await ctx.step.run_workflow("kid", child)

@workflow
async def hurries(ctx: Context) -> None:
    retry = Retry(max_attempts=9, first_delay=5, jitter=False)
    await ctx.step.options(retry=retry, total_timeout=2).run("pay", breaks)
"""


def test_show_names_whose_error_it_was(shell: Shell) -> None:
    (shell.folder / "kids.py").write_text(KIDS)
    assert shell.do("run", "kids.py:parent", "--id", "p").code == 1
    said = shell.ask("show", "p").out
    [row] = [line for line in said.splitlines() if line.startswith("kid ")]
    assert row.split()[:3] == ["kid", "child", "failed"]
    assert "failed: " not in row
    assert row.endswith("p/kid: ValueError: no such card")
    assert 'step "kid", child p/kid:\n' in said
    assert "in child\n" in said, "the child's own line"
    assert shell.do("run", "kids.py:hurries", "--id", "h").code == 1
    said = shell.ask("show", "h").out
    [first] = [line for line in said.splitlines() if line.startswith("  attempt 1")]
    assert first.endswith("ValueError: no such card")
    [row] = [line for line in said.splitlines() if line.startswith("pay ")]
    assert "would pass before the next attempt" in row


def test_what_a_run_waited_for_when_it_was_ended_is_not_shown_as_waiting(shell: Shell) -> None:
    shell.waiting("o")
    assert shell.ask("terminate", "o", "--reason", "enough").code == 0
    said = shell.ask("show", "o").out
    [row] = [line for line in said.splitlines() if line.startswith("approval ")]
    assert row.split()[:3] == ["approval", "signal", "cancelled"]
    assert row.endswith("ended with its run")


FILLS = """
import resource, signal
from perdure import Context, workflow
from perdure.cli import following

# A file that grows beyond this is as a disk without space.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
following.PATIENCE = 0.3

@workflow
async def fills(ctx: Context) -> int:
    return sum([len(await ctx.step.run(f"fill-{n}", lambda: "x" * 100_000)) for n in range(100)])
"""


def test_a_run_on_a_full_disk_ends_says_so_and_goes_on_when_there_is_space(shell: Shell) -> None:
    (shell.folder / "fills.py").write_text(FILLS)
    said = shell.do("run", "fills.py:fills", "--id", "f-1")
    assert (said.code, said.out) == (4, "")
    assert "could not be written for 0.3 s: " in said.err
    assert "Traceback" not in said.err
    assert "goes on with: perdure run fills.py:fills --id f-1" in said.err
    (shell.folder / "fills.py").write_text(FILLS.replace("2_000_000", "200_000_000"))
    said = shell.do("run", "fills.py:fills", "--id", "f-1")
    assert (said.code, said.out) == (0, "10000000\n"), said.err


def test_a_blocked_run_shows_its_report_and_goes_on_when_the_code_is_put_right(shell: Shell) -> None:
    shell.waiting()
    shell.ask("signal", "o-1", "approval")
    wrong = FLOWS.replace('ctx.step.run("charge", lambda: order.cents)', 'ctx.step.run("pay", lambda: order.cents)')
    (shell.folder / "flows.py").write_text(wrong)
    again = ["run", "flows.py:order", "--id", "o-1", "--input", '{"id": "o", "cents": 42}']
    said = shell.do(*again)
    assert said.code == 1
    assert "cannot be replayed" in said.err
    assert "flows.py:" in said.err
    assert "cannot be replayed" in shell.ask("why", "o-1").out
    (shell.folder / "flows.py").write_text(FLOWS)
    assert shell.do(*again).code == 0


# --- wrong input


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["flows.py:greet", "--input", "you"], "A text needs its quotes"),
        (["flows.py:greet", "--input", "{"], "is not JSON"),
        (["flows.py:greet", "--input", '["\\ud800"]'], "has a lone surrogate"),
        (["flows.py:greet", "--arg", 'name="\\udc00 and \\ud83d"'], "has a lone surrogate"),
        (["flows.py:greet", "--input", "@nothing.json"], "cannot be read"),
        (["flows.py:greet", "--arg", "name"], "has no name"),
        (["flows.py:greet", "--arg", 'nme="x"'], 'there is no parameter "nme"'),
        (["flows.py:greet"], '"name" is missing'),
        (["flows.py:greet", "--input", "5"], "str is expected, found 5"),
        (["flows.py:order", "--input", '{"id": "o"}'], "does not fit"),
        (["flows.py:greet", "--input", '"x"', "--id", "a\n"], "not printable"),
        (["flows.py"], "MODULE:WORKFLOW"),
        (["nowhere.py:greet"], "There is no file nowhere.py"),
        (["nowhere:greet"], "ModuleNotFoundError: No module named 'nowhere'"),
        (["nowhere.orders:greet"], "Give the command in the folder that has nowhere, or the path to its .py file.\n"),
        (["needing.py:greet"], "Install that module where perdure is installed, or mend the import.\n"),
        (["broken.py:greet"], "SyntaxError"),
        (["raising.py:greet"], "KeyError: 'HOME_OF_NOBODY'"),
        (["raising.py:greet"], "). Mend the module and give the command again.\n"),
        (["json:greet"], "holds no workflows"),
    ],
)
def test_wrong_input_is_exit_2_in_a_sentence(shell: Shell, arguments: list[str], saying: str) -> None:
    (shell.folder / "broken.py").write_text("def (")
    (shell.folder / "raising.py").write_text("import os\nos.environ['HOME_OF_NOBODY']\n")
    (shell.folder / "needing.py").write_text("import nowhere.orders\n")
    said = shell.do("run", *arguments)
    assert said.code == 2, said.err
    assert saying in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    store = shell.ask("list")
    assert store.code == 4 or "No runs." in store.err


def test_a_workflow_that_is_not_there_is_exit_3(shell: Shell) -> None:
    said = shell.do("run", "flows.py:nothing")
    assert (said.code, "It has: greet, order" in said.err) == (3, True), said.err
    assert not list(shell.folder.glob("*.db*"))


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e300", "-1"])
def test_a_timeout_that_is_no_length_of_time_is_exit_2(shell: Shell, seconds: str) -> None:
    assert shell.do("run", "flows.py:greet", "--id", "g", "--input", '"a"').code == 0
    for command in (["result", "g"], ["run", "flows.py:greet", "--input", '"b"']):
        said = shell.do(*command, "--timeout", seconds)
        assert said.code == 2, said.err
        assert "Traceback" not in said.err


def test_an_id_with_another_input_is_exit_2(shell: Shell) -> None:
    assert shell.do("run", "flows.py:greet", "--id", "g", "--input", '"a"').code == 0
    said = shell.do("run", "flows.py:greet", "--id", "g", "--input", '"b"')
    assert said.code == 2
    assert "was used before" in said.err


# --- stores


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "x"], ["history", "x"], ["result", "x"], ["signal", "x", "s"], ["cancel", "x"], ["why", "x"]],
)
def test_readers_create_no_store(shell: Shell, arguments: list[str]) -> None:
    said = shell.ask(*arguments)
    assert said.code == 4
    assert "reading does not create one" in said.err
    assert not list(shell.folder.glob("*.db*"))


def test_a_store_url_that_names_none_is_exit_2(shell: Shell) -> None:
    for url in ("", "orders.db", "mysql://x", "sqlite://", "sqlite:///o.db?color=red"):
        said = shell.ask("list", "--store", url)
        assert said.code == 2, (url, said.err)
        assert "create=false" not in said.err


@pytest.mark.parametrize("command", [["list"], ["start", "greet"], ["db", "status"], ["db", "upgrade"]])
def test_a_store_in_a_folder_that_is_not_there_is_exit_4(shell: Shell, command: list[str]) -> None:
    said = shell.ask(*command, "--store", "sqlite:///no/folder/o.db")
    assert (said.code, "there is no folder" in said.err) == (4, True), said.err
    assert "create=false" not in said.err


def test_a_file_that_is_no_store_is_exit_4(shell: Shell) -> None:
    (shell.folder / "notes.txt").write_text("no database at all, but long enough to be looked at\n" * 20)
    assert shell.ask("list", "--store", "sqlite:///notes.txt").code == 4


def test_the_store_comes_from_the_environment(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_STORE", "sqlite:///elsewhere.db")
    assert shell.do("run", "flows.py:greet", "--id", "g", "--input", '"a"').code == 0
    assert (shell.folder / "elsewhere.db").exists()
    assert not (shell.folder / "perdure.db").exists()
    assert shell.ask("why", "g").code == 0


# --- asking


def test_no_such_run_or_workflow_is_exit_3(shell: Shell) -> None:
    shell.waiting()
    for arguments in (["show", "x"], ["result", "x"], ["signal", "x", "s"], ["cancel", "x"], ["terminate", "x"]):
        said = shell.ask(*arguments)
        assert said.code == 3, said.err
        assert 'There is no run "x"' in said.err
    assert shell.ask("start", "nothing").code == 3


def test_a_waiting_run_is_told_in_every_way(shell: Shell) -> None:
    shell.waiting()
    assert 'for signal "approval"' in shell.ask("why", "o-1").out
    shown = shell.ask("show", "o-1").out
    assert "charge    step    done     1" in shown
    assert 'for signal "approval"' in shown
    assert shell.json("show", "o-1")["steps"][0]["id"] == "charge"
    assert 'signal "approval"' in shell.json("why", "o-1")["why"]
    events = [json.loads(line) for line in shell.ask("history", "o-1", "--json").out.splitlines()]
    assert [event["kind"] for event in events] == ["started", "step_completed", "signal_wait"]
    assert "signal_wait" in shell.ask("history", "o-1").out
    late = shell.ask("result", "o-1", "--timeout", "0.05")
    assert late.code == 5
    assert 'for signal "approval"' in late.err


def test_signals_cancel_and_terminate_act_and_say_so(shell: Shell) -> None:
    shell.waiting("a")
    shell.waiting("b")
    assert shell.json("signal", "a", "approval", "--input", "1", "--message-id", "m")["id"] == "a"
    assert shell.ask("signal", "a", "approval", "--input", "1", "--message-id", "m").code == 0
    assert shell.ask("terminate", "b", "--reason", "not needed").err == "Run b is terminated.\n"
    assert shell.ask("terminate", "b").code == 0, "twice is once"
    assert shell.ask("cancel", "b").code == 0
    ended = shell.ask("result", "b")
    assert ended.code == 1
    assert "not needed" in ended.err
    late = shell.ask("signal", "b", "approval")
    assert late.code == 1
    assert "has ended" in late.err
    assert shell.ask("cancel", "a", "--reason", "no").err == "Run a was asked to cancel.\n"


def test_lists_are_filtered_and_come_in_pages(shell: Shell) -> None:
    shell.waiting("o-1")
    for number in range(5):
        assert shell.ask("start", "greet", "--id", f"g-{number}", "--input", '"a"').out == f"g-{number}\n"
    first = shell.ask("list", "--limit", "4", "--json")
    ids = [json.loads(line)["id"] for line in first.out.splitlines()]
    cursor = first.err.split("--cursor ")[1].split()[0]
    rest = shell.ask("list", "--limit", "4", "--json", "--cursor", cursor)
    ids += [json.loads(line)["id"] for line in rest.out.splitlines()]
    assert ids == ["g-4", "g-3", "g-2", "g-1", "g-0", "o-1"]
    assert "--cursor" not in rest.err
    assert [line.split()[0] for line in shell.ask("list", "--status", "waiting").out.splitlines()[1:]] == ["o-1"]
    assert len(shell.ask("list", "--workflow", "greet").out.splitlines()) == 6
    assert "no worker serves it" in shell.ask("list").out
    assert shell.ask("list", "--status", "lost").code == 2
    assert shell.ask("list", "--cursor", "x").code == 2


def test_namespaces_do_not_see_each_other(shell: Shell) -> None:
    assert shell.do("run", "flows.py:greet", "--id", "g", "--input", '"a"', "--namespace", "blue").code == 0
    assert shell.ask("show", "g").code == 3
    assert shell.ask("show", "g", "--namespace", "blue").code == 0


def test_prune_removes_what_ended_long_enough_ago_and_says_how_much(shell: Shell) -> None:
    shell.waiting("live")
    for number in range(3):
        shell.ask("start", "greet", "--id", f"g-{number}", "--input", '"a"')
        shell.ask("terminate" if number else "cancel", f"g-{number}")
    assert shell.ask("prune", "--older-than", "1h").err == "0 runs removed.\n"
    assert shell.ask("prune", "--older-than", "0s", "--dry-run").err == "2 runs would be removed.\n"
    assert shell.json("prune", "--older-than", "0s", "--status", "completed") == {"runs": 0, "dry_run": False}
    assert shell.ask("prune", "--older-than", "0s", "--workflow", "order", "--namespace", "default").code == 0
    assert shell.ask("prune", "--older-than", "0s", "--status", "terminated", "--limit", "1").err == "1 run removed.\n"
    assert shell.json("prune", "--older-than", "0s") == {"runs": 1, "dry_run": False}
    ids = [json.loads(line)["id"] for line in shell.ask("list", "--json").out.splitlines()]
    assert ids == ["g-0", "live"]
    for wrong in ("soon", "1y", "-1d", "1e99w", "30", "0"):
        assert shell.ask("prune", "--older-than", wrong).code == 2
    assert shell.ask("prune", "--older-than", "9" * 30 + "w").code == 2
    assert shell.ask("prune").code == 2
    assert shell.ask("prune", "--older-than", "1h", "--status", "running").code == 2


def test_start_refuses_what_does_not_fit_and_uses_what_exists(shell: Shell) -> None:
    shell.waiting()
    assert shell.ask("start", "greet", "--arg", 'nme="x"').code == 2
    assert shell.ask("start", "greet", "--id", "g", "--input", '"x"').out == "g\n"
    assert shell.ask("start", "greet", "--id", "g", "--input", '"x"').out == "g\n"
    assert shell.ask("start", "greet", "--id", "g", "--input", '"x"', "--if-exists", "fail").code == 2
    assert shell.json("start", "greet", "--input", '"x"', "--delay", "60")["status"] == "scheduled"


# --- worker


def test_a_worker_drains_on_sigterm_and_leaves_with_0(shell: Shell) -> None:
    worker = shell.begin("worker", "flows.py", "--json")
    until(lambda: "serves" in shell.log)
    assert shell.ask("start", "holds", "--id", "h", "--input", "0.4").code == 0
    shell.holding()
    worker.send_signal(signal.SIGTERM)
    out, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0, shell.log
    assert json.loads(out)["drained"] is True
    assert [e["kind"] for e in shell.json("show", "h")["steps"] if e.get("state") == "done"] == ["step"]


@pytest.mark.parametrize("workflow", [["holds", "--input", "60"], ["clogs"]])
def test_a_step_that_does_not_end_cannot_hold_a_worker_up(shell: Shell, workflow: list[str]) -> None:
    worker = shell.begin("worker", "flows.py", "--grace", "0.2")
    until(lambda: "serves" in shell.log)
    assert shell.ask("start", *workflow).code == 0
    shell.holding()
    asked = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 1
    assert time.monotonic() - asked < 10


def test_a_second_signal_ends_a_worker_at_once(shell: Shell) -> None:
    worker = shell.begin("worker", "flows.py")
    until(lambda: "serves" in shell.log)
    assert shell.ask("start", "holds", "--input", "60").code == 0
    shell.holding()
    worker.send_signal(signal.SIGTERM)
    until(lambda: "Stopping" in shell.log)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 130


def test_several_processes_are_started_again_and_stop_together(shell: Shell) -> None:
    parent = shell.begin("worker", "flows.py", "--processes", "2")
    until(lambda: shell.log.count("serves") == 2)
    assert shell.ask("start", "holds", "--id", "h", "--input", "0.5").code == 0
    os.kill(shell.holding(), signal.SIGKILL)
    until(lambda: shell.log.count("serves") == 3)
    assert "was killed by signal 9; another starts in" in shell.log
    assert shell.ask("result", "h", "--timeout", str(PATIENCE)).out == '"held"\n'
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(PATIENCE) == 0


@pytest.mark.parametrize("after", [0.3, 0.6, 0.9])
def test_processes_that_are_stopped_before_they_serve_leave_in_peace(shell: Shell, after: float) -> None:
    process = shell.begin("worker", "flows.py", "--processes", "2")
    until(lambda: list(shell.folder.glob("perdure.db")))
    time.sleep(after)
    process.terminate()
    assert process.wait(PATIENCE) == 0, shell.log
    assert "grace ran out" not in shell.log


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [(["flows.py:greet"], "Whole modules are served: write flows.py."), (["flows.py", "--lease", "0.001"], "0.1")],
)
def test_a_worker_that_makes_no_sense_is_exit_2(shell: Shell, arguments: list[str], saying: str) -> None:
    said = shell.do("worker", *arguments)
    assert (said.code, saying in said.err) == (2, True), said.err


def test_the_command_that_why_proposes_can_be_typed_as_it_stands(shell: Shell) -> None:
    there = ["--store", "sqlite:///other.db", "--namespace", "shop"]
    order = ["--input", '{"id": "o", "cents": 42}', "--timeout", "0.2"]
    assert shell.do("run", "flows.py:order", "--id", "o-1", *order, *there).code == 5
    proposed = shell.ask("why", "o-1", *there).out.split("`")[1]
    assert proposed == "perdure signal o-1 approval --store sqlite:///other.db --namespace shop"
    assert shell.ask(*shlex.split(proposed)[1:]).code == 0
    assert proposed.rpartition(" --store")[2] in shell.ask("show", "o-1", *there).out


def test_json_that_is_nested_too_deep_is_exit_2(shell: Shell) -> None:
    # From Python 3.14 on the stack of C is the limit.
    (shell.folder / "deep.json").write_text("[" * 1_000_000 + "]" * 1_000_000)
    said = shell.ask("start", "greet", "--input", "@deep.json")
    assert (said.code, "nested too deep" in said.err) == (2, True)


def test_processes_whose_parent_was_killed_leave(shell: Shell) -> None:
    parent = shell.begin("worker", "flows.py", "--processes", "2")
    until(lambda: shell.log.count("serves") == 2)
    assert shell.ask("start", "holds", "--input", "0.1").code == 0
    child = shell.holding()
    parent.kill()
    until(lambda: not alive(child))


def test_a_worker_without_workflows_is_exit_2(shell: Shell) -> None:
    said = shell.do("worker", "json")
    assert said.code == 2
    assert "holds no workflows" in said.err
    (shell.folder / "other.py").write_text(FLOWS)
    twice = shell.do("worker", "flows.py", "other.py")
    assert twice.code == 2
    assert "flows.py" in twice.err
    assert "other.py" in twice.err


# --- the command itself


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra_one_sentence_names_the_install_line(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from perdure.cli import main; main(['list'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"The perdure command needs {package}: pip install 'perdure[cli]'\n"


def test_every_command_has_a_help_text(shell: Shell) -> None:
    overview = shell.ask("--help")
    assert overview.code == 0
    for name in COMMANDS:
        if name in overview.out:
            assert f"perdure {name} [OPTIONS]" in shell.ask(name, "--help").out
    assert "  list " in overview.out
    assert shell.ask("nothing").code == 2
    assert shell.ask("list", "--nothing").code == 2


def test_commands_in_sentences_are_as_they_are_to_be_typed(shell: Shell) -> None:
    store = f"sqlite:///{shell.folder}/my store.db"
    failed = shell.do("run", "flows.py:fails", "--id", "it's", "--input", '"no"', "--store", store)
    assert failed.code == 1
    proposed = failed.err.partition("`")[2].partition("`")[0]
    assert "show" in proposed
    said = shell.ask(*shlex.split(proposed)[1:])
    assert said.code == 0
    assert said.out.startswith("run       it's")
    waits = ("run", "flows.py:order", "--id", "my `order", "--input", '{"id": "o", "cents": 42}', "--timeout", "0.2")
    assert shell.do(*waits, "--store", store).code == 5
    why = shell.ask("why", "my `order", "--store", store).out
    proposed = why.partition("`perdure ")[2].rpartition("`")[0]
    assert shell.ask(*shlex.split(proposed)).code == 0
    failed = shell.do("run", "flows.py:fails", "--id", "-- -x", "--input", '"no"', "--store", store)
    proposed = failed.err.partition("`")[2].partition("`")[0]
    assert proposed == f"perdure show --store {shlex.quote(store)} -- '-- -x'"
    assert shell.ask(*shlex.split(proposed)[1:]).out.startswith("run       -- -x")


def test_who_writes_to_a_quarantined_run_is_told_that_nothing_reads_it(shell: Shell) -> None:
    shell.waiting()
    with closing(sqlite3.connect(shell.folder / "perdure.db")) as db:
        db.execute("UPDATE perdure_runs SET status = 'quarantined', wake_at = NULL, owner = NULL, strikes = 3")
        db.commit()
    for command in (["cancel", "o-1"], ["signal", "o-1", "approval"]):
        said = shell.ask(*command)
        assert said.code == 0
        assert said.err.endswith("it is quarantined, so nothing of it reads that: `perdure terminate o-1`.\n")


# Universes end in the middle of things: coroutines that nobody awaits any more.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_sim_prints_one_object_for_programs(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shell.json("sim", "--universes", "2")
    assert (found["seed"], found["universes"], found["violation"]) == (0, 2, None)
    assert all(count > 0 for count in found["sometimes"].values())

    played = sim.run

    def breaking(seed: int, **rest: Any) -> sim.Report:
        report = played(seed, **rest)
        report.violation = sim.Violation("INV-1", "made up") if seed == 1 else None
        return report

    monkeypatch.setattr(sim, "run", breaking)
    said = shell.ask("sim", "--universes", "5", "--no-shrink", "--json")
    assert said.code == 1
    found = json.loads(said.out)
    assert (found["universes"], found["violation"]["seed"], found["violation"]["why"]) == (2, 1, "INV-1: made up")
    # What it is given is a tape.
    tape = str(shell.folder / "kept.json")
    Path(tape).write_text(json.dumps(found["violation"]))
    assert json.loads(shell.ask("sim", "--tape", tape, "--no-shrink", "--json").out) | {"sometimes": 0} == {
        "seed": 1,
        "universes": 1,
        "sometimes": 0,
        "violation": found["violation"],
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_sentence(shell: Shell) -> None:
    shell.waiting()
    line = [sys.executable, "-m", "perdure", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=shell.folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "perdure: The output could not be written: No space left on device.\n")


@pytest.mark.parametrize("imported", ["msgspec", "click", "perdure.cli.why"])
def test_ctrl_c_while_the_command_is_being_imported_ends_it_without_a_word(tmp_path: Path, imported: str) -> None:
    # The script, interrupted by an import that takes long.
    interrupting = f"""
import importlib.abc, os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
sys.argv = ["perdure", "why", "a-run"]
from perdure_command import main
main()
"""
    said = subprocess.run(
        [sys.executable, "-c", interrupting], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert said.returncode == 130
    assert said.stdout == ""
    assert said.stderr.strip() in ("", "perdure: Interrupted.")
