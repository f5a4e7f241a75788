"""An engine's outside with an engine's processes: answers the agent's questions and has children and grandchildren.

Standard library only, so that it starts in no time. `python tree_engine.py PORT MODEL FOLDER`; files in FOLDER steer
it: `unwell` (/health answers 503), `silent` (accepts, never answers), `running` (its number is told as load), `broken`
(exits with 3 before it listens), `stubborn` (ignores SIGTERM). It writes the pids of its processes to FOLDER/pids.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "child":
    subprocess.Popen([sys.executable, "-c", sys.argv[3], "grandchild", sys.argv[2], ""])
else:
    os.setsid()  # a group and session of its own: killing the engine's group does not reach it
with open(sys.argv[2], "a") as pids:
    pids.write(f"{sys.argv[1]} {os.getpid()}\\n")
time.sleep(600)
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    model: str

    def do_GET(self) -> None:
        if (self.folder / "silent").exists():
            time.sleep(600)
        if self.path == "/health":
            self._answer(503 if (self.folder / "unwell").exists() else 200, b"")
        elif self.path == "/v1/models":
            self._answer(200, json.dumps({"data": [{"id": self.model, "max_model_len": 64}]}).encode())
        elif self.path == "/metrics":
            self._answer(200, self._metrics())
        elif self.path == "/v1/chat/completions":
            self._answer(405, b"")
        else:
            self._answer(404, b"")

    def _metrics(self) -> bytes:
        running = self.folder / "running"
        number = running.read_text() if running.exists() else "0"
        lines = (
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0"}} {number}.0',
            'vllm:num_requests_waiting{engine="0"} 0.0',
            'vllm:cache_config_info{block_size="32",kv_cache_size_tokens="4096"} 1.0',
        )
        return "\n".join(lines).encode()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    port, Handler.model, Handler.folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    print("tree engine is starting", flush=True)
    if (Handler.folder / "broken").exists():
        print("RuntimeError: the tree is broken", flush=True)
        sys.exit(3)
    if (Handler.folder / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = Handler.folder / "pids"
    pids.write_text(f"engine {os.getpid()}\n")
    subprocess.Popen([sys.executable, "-c", CHILD, "child", str(pids), CHILD])
    while len(pids.read_text().splitlines()) < 3:
        time.sleep(0.01)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
