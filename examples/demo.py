"""`make demo`: three orders, a payment service that misbehaves, and a worker that is killed in the middle of a charge.

The killed worker had sent the charge, the service had booked it, and nothing was recorded yet: the worst moment. The
next worker repeats the step with the same idempotency key, so the service's own ledger has one charge per order.

`python examples/demo.py URL` plays the same on another store: postgresql://user@host/database
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO, Any

from perdure import Client, RunExists, RunHandle, UnknownWorkflow

HERE = Path(__file__).parent
ORDERS = {"order-1": 4200, "order-2": 990, "order-3": 12500}
VICTIM = "order-2"
PATIENCE = 30.0

began = time.monotonic()


def tell(text: str) -> None:
    print(f"{time.monotonic() - began:6.2f} s  {text}", flush=True)


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


class Stage:
    """The processes of the demo, and the folder with the store and the worker's log."""

    def __init__(self, folder: Path, store: str | None) -> None:
        self.store = store or f"sqlite:///{folder}/shop.db"
        self.log: IO[bytes] = (folder / "worker.log").open("wb")
        self.environment = {**os.environ, "PERDURE_STORE": self.store}
        self.processes: list[subprocess.Popen[Any]] = []

    def payments(self) -> str:
        """Start the payment service; its URL."""
        service = subprocess.Popen(
            [sys.executable, str(HERE / "payments.py"), VICTIM], stdout=subprocess.PIPE, text=True
        )
        self.processes.append(service)
        assert service.stdout is not None
        url = service.stdout.readline().strip()
        self.environment["PAYMENTS"] = url
        return url

    def worker(self) -> subprocess.Popen[Any]:
        """Start `perdure worker shop.py`."""
        command = [sys.executable, "-m", "perdure", "worker", str(HERE / "shop.py")]
        worker = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        self.processes.append(worker)
        tell(f"worker {worker.pid} started: perdure worker examples/shop.py")
        return worker

    def show(self, run: str) -> str:
        """What `perdure show RUN` prints."""
        command = [sys.executable, "-m", "perdure", "show", run]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.log.close()


async def started(client: Client, order: str, cents: int) -> RunHandle[Any]:
    """Start an order's run, as soon as a worker has announced the workflow."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            new = client.options(id=order, if_exists="fail")
            handle: RunHandle[Any] = await new.start("fulfil", {"id": order, "cents": cents})
            return handle
        except RunExists as error:
            raise SystemExit(f"{error} The demo has been played in this store: give it another one.") from None
        except UnknownWorkflow:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.02)


async def play(stage: Stage) -> list[str]:
    """The whole story; what is wrong at its end."""
    url = stage.payments()
    tell(f"payment service at {url}: fails twice per charge, holds back its answer to {VICTIM}")
    worker = stage.worker()
    async with Client(stage.store) as client:
        runs = [await started(client, order, cents) for order, cents in ORDERS.items()]
        tell(f"started: {', '.join(run.id for run in runs)}")

        await asyncio.to_thread(get, f"{url}/booked")
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        tell(f'kill -9 {worker.pid}, in the middle of "charge" of {VICTIM}: booked by the service, recorded by nobody')
        get(f"{url}/release")

        stage.worker()
        for run in runs:
            await run.signal("approval", {"by": "finance"})
        tell("approved: all three")
        for run in runs:
            tell(f"{run.id}: {await run.result(timeout=PATIENCE)}")

    for run in runs:
        title(f"$ perdure show {run.id}")
        print(stage.show(run.id), end="")

    account = get(f"{url}/ledger")
    title("The payment service's own ledger")
    for charge in account["charges"]:
        requests = account["requests"][charge["order"]]
        print(f"  charge {charge['charge']}  {charge['order']}  {charge['cents']:>6} cents  after {requests} requests")
    return faults(account, killed=worker.returncode == -signal.SIGKILL)


def faults(account: Any, *, killed: bool) -> list[str]:
    found = [] if killed else ["the worker was not killed"]
    for order, cents in ORDERS.items():
        charged = [charge["cents"] for charge in account["charges"] if charge["order"] == order]
        if charged != [cents]:
            found.append(f"{order} should be charged {cents} once, but was charged {charged}")
    if account["requests"].get(VICTIM, 0) < 4:
        found.append(f"the charge of {VICTIM} was not repeated after the kill")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="perdure-demo-") as folder:
        stage = Stage(Path(folder), sys.argv[1] if len(sys.argv) > 1 else None)
        try:
            wrong = asyncio.run(play(stage))
        except BaseException:
            print((Path(folder) / "worker.log").read_text(), file=sys.stderr)
            raise
        finally:
            stage.close()
    print()
    for fault in wrong:
        print(f"WRONG: {fault}")
    if not wrong:
        tell(f"each order was charged once, although worker and service failed. {len(ORDERS)} orders, 1 kill -9.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
