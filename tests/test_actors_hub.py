"""What a name stands for, and how long the hub is waited for."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from actors.hub import expand, is_cached, is_path, offline, problems


@pytest.mark.parametrize(
    "name", ["gpt2", "Qwen/Qwen2.5-0.5B", "Anthropic/hh-rlhf", "meta-llama/Llama-3.2-1B", "nobody/nothing"]
)
def test_names_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_path(name)


@pytest.mark.parametrize(
    "name",
    [
        "./gpt2",
        "/models/gpt2",
        "~/gpt2",
        "../m",
        "models/gpt/2",
        "mine/prompts.jsonl",
        "mine/prompts.csv.gz",
        "here/prompts",
        "here",
    ],
)
def test_names_of_paths_also_of_mistyped_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_path(name)


def test_the_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand("~/models/gpt2") == "/home/ada/models/gpt2"
    assert expand("a~b") == "a~b"


@pytest.mark.parametrize("name", ["a\0b", "m" * 256, "m/" * 2100])
def test_what_no_path_can_be(name: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a path or a name, so it "):
        expand(name)


def test_a_hub_that_does_not_answer_is_waited_for_once_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that nobody serves takes the connection and says nothing; the libraries would wait for a minute each."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        found = problems({"nobody/model": "model", "nobody/rows": "dataset"}, limit_s=0.5)
        assert time.monotonic() - started < 30
    assert found.keys() == {"nobody/model", "nobody/rows"}
    assert all(problem.startswith("it does not answer") for problem in found.values())
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1", "its workers do not wait again"


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--nobody--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--nobody--model" / "refs").mkdir()
    (tmp_path / "models--nobody--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert is_cached("nobody/model") and not is_cached("nobody/other") and not is_cached("no such name!")
    assert problems({"nobody/model": "model"}) == {}
    assert problems({"nobody/other": "model"}) == {"nobody/other": "it is not in the cache, and HF_HUB_OFFLINE is set"}


def test_a_plan_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
