"""A real server of objects, moto's, in a process of its own, which refuses requests where a test wants it to.

`python object_server.py FOLDER` serves on a free port and prints its number; it ends with its parent. Before a request
is served, `FOLDER/refusals.json` is asked: if its pattern is found in "METHOD /path?query", the request is refused with
its status and Amazon's code. No signature is checked.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "bucket"
SLOW_DOWN = {"status": "503 Slow Down", "code": "SlowDown"}
WRONG_KEY = {"status": "403 Forbidden", "code": "InvalidAccessKeyId"}
_REFUSALS = "refusals.json"
_START_S = 60


class ObjectServer:
    """A running server. folder: its own. environment: what a client needs to find it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def refuse(self, request: str, times: int = 10**6, every: int = 1, **answer: str) -> None:
        """Refuse requests that this pattern is found in: so many, each n-th of them. answer: see SLOW_DOWN."""
        row = {"request": request, "times": times, "every": every, **(answer or SLOW_DOWN)}
        draft = self.folder / "draft"
        draft.write_text(json.dumps(row))
        draft.replace(self.folder / _REFUSALS)

    def serve_again(self) -> None:
        (self.folder / _REFUSALS).unlink(missing_ok=True)

    @property
    def requests(self) -> list[str]:
        """Every request so far: "METHOD /path?query", and "refused" at its end."""
        return (self.folder / "requests.txt").read_text().splitlines()


@contextmanager
def object_server(folder: Path) -> Iterator[ObjectServer]:
    """Start a server with an empty bucket; at the end it is gone."""
    pipe = subprocess.PIPE
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=pipe, stdout=pipe, stderr=log, text=True
        )
    assert process.stdout is not None
    try:
        is_ready = select.select([process.stdout], [], [], _START_S)[0]
        line = process.stdout.readline() if is_ready else ""
        assert line, f"the server of objects has not started: {(folder / 'server.log').read_text()}"
        yield ObjectServer(folder, int(line))
    finally:
        process.kill()
        process.communicate()


class Refusing:
    """The server's application, with requests that are refused."""

    def __init__(self, serve: Any, folder: Path) -> None:
        self._serve, self._folder = serve, folder
        self._lock = threading.Lock()
        self._rule, self._met, self._left = "", 0, 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        answer = self._refusal(request)
        with self._lock, (self._folder / "requests.txt").open("a") as file:
            file.write(request + (" refused\n" if answer else "\n"))
        if answer is None:
            return self._serve(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{answer['code']}</Code><Message>as the test wants</Message></Error>"
        start_response(answer["status"], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body.encode()]

    def _refusal(self, request: str) -> dict[str, str] | None:
        with self._lock:
            path = self._folder / _REFUSALS
            text = path.read_text() if path.exists() else ""
            row = json.loads(text or "{}")
            if text != self._rule:
                self._rule, self._met, self._left = text, 0, row.get("times", 0)
            if not self._left or not re.search(row["request"], request):
                return None
            self._met += 1
            if self._met % row["every"]:
                return None
            self._left -= 1
            return dict(row)


def serve(folder: Path) -> None:
    """Serve until the parent is gone."""
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    application = Refusing(DomainDispatcherApplication(create_backend_app), folder)
    server = make_server("127.0.0.1", 0, application, threaded=True)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
