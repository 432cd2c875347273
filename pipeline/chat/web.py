"""The chat as a page on this machine: one HTML file without anything from elsewhere, and a stream of events.

    GET /?token=...                     the page
    POST /say, header X-Token: ...      {"line": "..."} in; one JSON event a line out, as it happens

Any program or web page on this machine could send requests to an open port. So the server listens on loopback only, and
each request needs a random token, compared in constant time; the Host must be this server's, which stops a foreign name
that was made to lead here (DNS rebinding), and so must the Origin, if one is sent. Left out: more than one person; a
second request at the same time is told to wait.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.chat.chat import Chat, Event
from pipeline.chat.commands import events_of

_LONGEST = 65536  # bytes of a request
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class ChatServer(ThreadingHTTPServer):
    """Serves one chat on loopback."""

    daemon_threads = True

    def __init__(self, chat: Chat, port: int = 0) -> None:
        """port: 0 takes any free one. Raises ValueError when the port is not free."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ValueError(f"--port: must be free on this machine, got {port}: {error.strerror}") from error
        self.chat, self.token, self.busy = chat, secrets.token_urlsafe(32), threading.Lock()

    @property
    def hosts(self) -> tuple[str, str]:
        """The names by which a browser on this machine may call the server."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def url(self) -> str:
        """The address of the page, with its token."""
        return f"http://{self.hosts[0]}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ChatServer
    timeout = 30  # seconds in which a request must have come

    def do_GET(self) -> None:
        """The page."""
        address = urlsplit(self.path)
        if not self._may(parse_qs(address.query).get("token", [""])[0]):
            return
        if address.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is one page, /")
            return
        nonce, chat = secrets.token_urlsafe(16), self.server.chat
        setup = {"sides": [side.name for side in chat.sides], "environment": chat.environment is not None}
        page = resources.files("pipeline.chat").joinpath("page.html").read_text(encoding="utf-8")
        body = page.replace("NONCE", nonce).replace("SETUP", json.dumps(setup)).encode()
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", len(body), nonce)
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Carry out a line, and send what happens."""
        if not self._may(self.headers.get("X-Token", "")):
            return
        if urlsplit(self.path).path != "/say":
            self._refuse(HTTPStatus.NOT_FOUND, "lines are sent to /say")
            return
        line = self._line()
        if line is None:
            self._refuse(HTTPStatus.BAD_REQUEST, 'the body must be JSON such as {"line": "Hello."}')
            return
        if not self.server.busy.acquire(blocking=False):
            self._refuse(HTTPStatus.CONFLICT, "the models are still answering; wait until they have finished")
            return
        try:
            self._answer(HTTPStatus.OK, "application/x-ndjson")
            with closing(events_of(self.server.chat, line.strip())) as events:
                for event in events:
                    self._send(event)
        except ConnectionError:
            pass  # the page was left; what was said so far stays
        except ValueError as error:
            self._send(Event(kind="note", text=str(error)))
        finally:
            self.server.busy.release()

    def _may(self, token: str) -> bool:
        """Whether the request comes from the page; else it is refused."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"Host: must be {hosts[0]}; open the address that raylign chat printed")
        elif origin is not None and origin not in [f"http://{host}" for host in hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, f"Origin: must be http://{hosts[0]}, or not given")
        elif not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "token: must be given; open the address that raylign chat printed")
        else:
            return True
        return False

    def _line(self) -> str | None:
        """The line of the request; None if the request is something else."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > _LONGEST:
            return None
        try:
            line = json.loads(self.rfile.read(int(length)))["line"]
            return line if isinstance(line, str) and line.encode() is not None else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _send(self, event: Event) -> None:
        self.wfile.write(json.dumps(event.as_dict()).encode() + b"\n")
        self.wfile.flush()

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        body = f"{why}\n".encode()
        self._answer(status, "text/plain; charset=utf-8", len(body))
        self.wfile.write(body)

    def _answer(self, status: HTTPStatus, kind: str, length: int | None = None, nonce: str = "") -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY.format(nonce) if nonce else "default-src 'none'")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: an address has the token in it."""


def serve(chat: Chat, port: int, say: Callable[[str], None]) -> None:
    """Serve the chat until a signal ends the command. Raises ValueError when the port is not free."""
    with ChatServer(chat, port) as server:
        say(f"raylign chat: open {server.url}   (Ctrl-C ends it)")
        server.serve_forever()
