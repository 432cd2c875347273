"""`raylign chat --web`: the real server of a tiny run, asked over HTTP; who is let in, and what streams out."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat.chat import Chat
from pipeline.chat.web import ChatServer
from run_helpers import command, environment
from test_pipeline_chat import new_run, opened


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    chat = opened(new_run(tmp_path_factory.mktemp("web") / "run"), max_tokens=6)
    with ChatServer(chat) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(
    server: ChatServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if body is None else json.dumps(body), named)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.msg
    connection.close()
    return found


def test_the_page_comes_with_the_token_and_has_nothing_from_elsewhere(server: ChatServer) -> None:
    status, page, headers = asked(server, "GET", f"/?token={server.token}")
    assert status == 200
    assert '"sides": ["baseline", "policy"]' in page
    assert "NONCE" not in page and "SETUP" not in page
    assert not re.search(r"(src|href)\s*=|https?://|innerHTML", page)
    [nonce] = set(re.findall(r'nonce="([^"]+)"', page))
    assert f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    assert server.token not in page


@pytest.mark.parametrize("token", ["", "wrong", "ü"], ids=["none", "wrong", "not ASCII"])
def test_without_the_token_nothing_is_told(server: ChatServer, token: str) -> None:
    query = f"/?token={'%C3%BC' if token == 'ü' else token}" if token else "/"
    status, text, _ = asked(server, "GET", query)
    assert (status, text) == (403, "token: must be given; open the address that raylign chat printed\n")
    headers = {"X_Token": token} if token else {}
    status, text, _ = asked(server, "POST", "/say", {"line": "c"}, **headers)
    assert status == 403
    assert not server.chat.is_open, "the models were not asked"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:80", ""])
def test_another_host_is_refused_with_the_right_token(server: ChatServer, host: str) -> None:
    status, text, _ = asked(server, "GET", f"/?token={server.token}", Host=host)
    assert status == 403 and text.startswith("Host: must be 127.0.0.1:")
    assert asked(server, "POST", "/say", {"line": "c"}, X_Token=server.token, Host=host)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1"])
def test_another_page_s_request_is_refused_with_the_right_token(server: ChatServer, origin: str) -> None:
    status, text, _ = asked(server, "POST", "/say", {"line": "c"}, X_Token=server.token, Origin=origin)
    assert status == 403 and text.startswith("Origin: must be ")


def test_a_line_streams_what_both_models_say(server: ChatServer) -> None:
    origin = f"http://localhost:{server.server_port}"
    headers = {"X_Token": server.token, "Origin": origin, "Host": f"localhost:{server.server_port}"}
    status, text, _ = asked(server, "POST", "/say", {"line": "/prompt"}, **headers)
    events = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and events[0]["kind"] == "prompt"
    for side in ("baseline", "policy"):
        kinds = [event["kind"] for event in events if event["side"] == side]
        assert kinds[-1] == "score" and "end" in kinds
    assert asked(server, "POST", "/say", {"line": "/reset"}, **headers)[0] == 200


@pytest.mark.parametrize("body", [None, [], {"line": 3}, {"lines": "c"}, {"line": "x" * 70000}, {"line": "\ud800"}])
def test_a_body_that_is_no_line_is_refused(server: ChatServer, body: Any) -> None:
    status, text, _ = asked(server, "POST", "/say", body, X_Token=server.token)
    assert (status, text) == (400, 'the body must be JSON such as {"line": "Hello."}\n')


def test_a_second_request_at_the_same_time_is_told_to_wait(server: ChatServer) -> None:
    with server.busy:
        assert asked(server, "POST", "/say", {"line": "c"}, X_Token=server.token)[0] == 409


def test_it_listens_on_loopback_alone_and_a_taken_port_is_refused(server: ChatServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    chat: Chat = server.chat
    with pytest.raises(ValueError, match=f"--port: must be free on this machine, got {server.server_port}"):
        ChatServer(chat, server.server_port)


def test_the_command_prints_the_address_and_ends_with_a_signal(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", models=("finetuned",))
    arguments = command("chat", str(run), "--web", "--max-tokens", "3")
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "raylign chat: open " in line)
        [(port, token)] = re.findall(r"open http://127\.0\.0\.1:(\d+)/\?token=(\S+)", line)
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
        connection.request("GET", f"/?token={token}")
        assert connection.getresponse().status == 200
        connection.close()
        process.terminate()
        assert process.wait(timeout=60) == 143
