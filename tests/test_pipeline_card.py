"""The model card of a run, and the way of a policy to the Hugging Face hub."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Folder
from entry_point import raylign
from pipeline.algorithms.grpo import GRPO
from pipeline.config.recipe import load, recipe_path
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, ModelConfig
from pipeline.data.config import DataConfig
from pipeline.folder.manifests import Chain
from pipeline.report.card import CARD, card, public, write_card
from pipeline.run.card import card_facts, recipe_of
from pipeline.run.push import policy_files
from run_helpers import ROOT, recipe
from tiny_models import save_gpt2

TOKEN = "hf_secretOfTheTest"


# ---- the card ----


@pytest.mark.parametrize("name", ["quickstart", "walks", "gpt2-hh", "conversation-options", "lm-human-preferences"])
def test_the_recipe_in_the_card_repeats_the_run(name: str) -> None:
    config = load(recipe_path(name))
    again = RunConfig.model_validate(tomllib.loads(recipe_of(config)))
    assert again == config.model_copy(update={"cluster": again.cluster})


def test_the_recipe_keeps_an_algorithm_of_defaults_alone() -> None:
    config = recipe(algorithm=GRPO(), batch=BatchConfig(prompts=4, group_size=2))
    assert RunConfig.model_validate(tomllib.loads(recipe_of(config))).algorithm == GRPO()


def test_the_front_matter_is_what_the_hub_reads() -> None:
    from huggingface_hub import ModelCard

    config = recipe(model=ModelConfig(path="openai-community/gpt2"))
    read = ModelCard(card(card_facts(config, "rewards:rule"), None)).data.to_dict()
    assert read == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
        "tags": ["raylign", "rlhf", "reinforcement-learning", "ppo"],
    }


def test_nothing_of_the_machine_is_in_the_card(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path / "start")
    data = DataConfig(
        prompts="s3://KEY:SECRET@bucket/prompts.jsonl?token=SECRET", demonstrations=str(tmp_path / "demos.jsonl")
    )
    text = card(card_facts(recipe(task="files", data=data, model=ModelConfig(path=str(model))), ""), None)
    assert str(tmp_path) not in text
    assert "SECRET" not in text
    assert "base_model" not in text
    assert "demonstrations: `demos.jsonl`" in text
    assert "s3://bucket/prompts.jsonl" in text


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("/home/me/models/start", "start"),
        ("~/prompts.jsonl", "prompts.jsonl"),
        ("owner/name", "owner/name"),
        ("hf://datasets/owner/name/a.jsonl", "hf://datasets/owner/name/a.jsonl"),
        ("https://me:password@host/a?key=1#b", "https://host/a"),
        (0.5, 0.5),
        (["/a/b", 1], ["b", 1]),
    ],
)
def test_what_others_may_see_of_a_setting(value: Any, seen: Any) -> None:
    assert public(value) == seen


def test_a_code_block_holds_whatever_is_in_the_recipe() -> None:
    config = recipe(task="mine:A```B")
    text = card(card_facts(config, ""), None)
    assert text.count("````") == 2


def test_a_card_changes_no_checksum_of_a_run(tmp_path: Path) -> None:
    """It is written after the stage is done, renewed after the evaluation, and may be edited by hand."""
    config = recipe()
    chain = Chain(config, tmp_path, {}, until="rl")
    Folder(tmp_path).write_text("policy/config.json", "{}")
    chain.begin("rl")
    without = chain.finish("rl", {}, 1.0)
    write_card(card_facts(config, ""), None, tmp_path / "policy")
    assert chain.finished("rl") == without
    assert chain.finish("rl", {}, 1.0).files == without.files, "the stage made longer, with a card in the folder"
    (tmp_path / "policy" / CARD).write_text("mine")
    assert chain.finished("rl") is not None
    (tmp_path / "policy" / "config.json").write_text("{ }")
    assert chain.finished("rl") is None, "of what is not a note, every byte counts"


# ---- to the hub ----


class Hub:
    """A hub on this machine that speaks the hub's protocol, as far as one commit needs it, and keeps what it gets."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.take(self, b"")

            def do_POST(self) -> None:
                hub.take(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST  # noqa: N815 - the name that the base class asks for

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path))
        authorised = request.headers.get("Authorization", "")
        self.tokens.add(authorised)
        answer = self.answer(path, body)
        status = 401 if authorised not in ("", f"Bearer {TOKEN}") else 404 if answer is None else 200
        said = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(said)))
        request.end_headers()
        request.wfile.write(said)

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":  # of the card's head
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/me/mine"}
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {**each, "actions": {"upload": {"href": f"{self.url}/bytes/{each['oid']}"}}} for each in objects
                ],
            }
        if path.startswith("/bytes/"):
            self.large[path.removeprefix("/bytes/")] = body
            return {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            return {"commitUrl": f"{self.url}/me/mine/commit/1", "commitOid": "1", "success": True}
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a policy, and with what must not leave the machine, also beside the policy's files."""
    run = tmp_path / "run"
    save_gpt2(run / "policy")
    write_card(card_facts(recipe(), ""), None, run / "policy")
    for name in ("metrics.jsonl", "experience/a.parquet", "policy/notes.txt", "policy/.env", "policy/optimizer.pt"):
        Folder(run).write_text(name, "private")
    return run


def pushed(hub: Hub, *arguments: str, cwd: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """`raylign push` in an interpreter of its own, since the hub's client reads its address when it is imported.

    Without Xet, whose server speaks another protocol: the weights go the way of Git LFS.
    """
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "hf")}
    settings |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipeline", "push", *arguments]
    environment = {**os.environ, **settings}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_push_uploads_the_policy_and_its_card_alone(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    said = pushed(hub, "run", "me/mine", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert set(hub.files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, content in hub.files.items():
        assert content == (run_dir / "policy" / name).read_bytes()
    assert [(one["name"], one["organization"], one["visibility"]) for one in hub.created] == [("mine", "me", "private")]
    assert said.stdout.startswith("raylign push: 6 files, ")
    assert TOKEN not in said.stdout + said.stderr
    assert f"Bearer {TOKEN}" in hub.tokens
    assert sum(path.endswith("/commit/main") for _, path in hub.requests) == 1, "all or nothing"


def test_a_public_repository_must_be_asked_for(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    assert pushed(hub, "run", "me/mine", "--public", cwd=tmp_path).returncode == 0
    assert [one["visibility"] for one in hub.created] == ["public"]


def test_a_refused_token_is_an_error_in_one_line_that_does_not_say_it(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    said = pushed(hub, "run", "me/mine", cwd=tmp_path, token="hf_wrongOfTheTest")
    assert said.returncode == 2
    assert "check HF_TOKEN" in said.stderr
    assert said.stderr.count("\n") == 1
    assert "hf_wrongOfTheTest" not in said.stderr
    assert not hub.created


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs the folder of a run and a repository"),
        (("run",), "needs the folder of a run and a repository"),
        (("run", "me/mine", "--delete"), "needs the folder of a run and a repository"),
        (("run", "mine"), "must be a repository of the Hugging Face hub, owner/name, got 'mine'"),
        (("run", "me/mi ne"), "must be a repository of the Hugging Face hub, owner/name, got 'me/mi ne'"),
        (("run", "me/.."), "must be a repository of the Hugging Face hub, owner/name, got 'me/..'"),
        (("nowhere", "me/mine"), "must be the folder of a run with a policy, got nowhere"),
        (("run", "me/mine"), "set HF_TOKEN"),
    ],
)
def test_a_push_that_cannot_work_is_refused(
    arguments: tuple[str, ...], words: str, run_dir: Path, tmp_path: Path
) -> None:
    nothing = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none"), "HF_HOME": str(tmp_path / "hf")}
    said = raylign("push", *arguments, cwd=tmp_path, **nothing)
    assert (said.code, said.out) == (2, "")
    assert words in said.err
    assert not {"torch", "ray"} & said.imported


def test_a_run_that_could_not_be_pushed_does_not_begin(tmp_path: Path) -> None:
    nothing = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none"), "HF_HOME": str(tmp_path / "hf")}
    said = raylign("run", "walks", "--push", "me/mine", "--run-dir", "run", cwd=tmp_path, **nothing)
    assert (said.code, said.out) == (2, "")
    assert "--push: must have a token" in said.err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_has_no_policy_to_push(run_dir: Path) -> None:
    assert [path.name for path in policy_files(run_dir)][:2] == ["README.md", "config.json"]
    (run_dir / "policy" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"policy/\*\.safetensors"):
        policy_files(run_dir)
    shutil.rmtree(run_dir / "policy")
    with pytest.raises(ValueError, match="end of reinforcement learning"):
        policy_files(run_dir)
