"""A payment service for the demo, in a process of its own: `python payments.py ORDER`. Prints its URL, then serves.

It behaves as badly as real ones do, and honours `Idempotency-Key` as good ones do:
- the first two requests for each charge get a 503;
- the charge of ORDER is booked, but its answer is held back, until the demo has killed the worker that waits for it.

POST /charges {order, cents}   GET /booked (answers when ORDER's charge is booked)   GET /release   GET /ledger
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAILS_FIRST = 2
PATIENCE = 30.0

held_order = sys.argv[1] if len(sys.argv) > 1 else ""
lock = threading.Lock()
booked = threading.Event()
released = threading.Event()
ledger: list[dict[str, Any]] = []
by_key: dict[str, dict[str, Any]] = {}
requests: dict[str, int] = {}


class Payments(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        charge = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        with lock:
            requests[charge["order"]] = requests.get(charge["order"], 0) + 1
            if requests[charge["order"]] <= FAILS_FIRST:
                self.answer(503, {"error": "overloaded"})
                return
            first = key not in by_key
            if first:
                by_key[key] = {"charge": len(ledger) + 1, **charge}
                ledger.append(by_key[key])
        if first and charge["order"] == held_order:
            booked.set()
            released.wait(PATIENCE)
        self.answer(200, by_key[key])

    def do_GET(self) -> None:
        if self.path == "/booked":
            self.answer(200 if booked.wait(PATIENCE) else 504, {})
        elif self.path == "/release":
            released.set()
            self.answer(200, {})
        else:
            with lock:
                self.answer(200, {"charges": ledger, "requests": requests})

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # whoever asked is dead

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the demo prints the ledger."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Payments)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
