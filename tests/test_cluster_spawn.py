"""What a plain class finds when it has become an actor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.placement import RoleDemand, plan_placement
from cluster.session import Session
from cluster.spawn import Spawner


class Plain:
    """Talks on every channel while it is made."""

    def __init__(self, word: str, *, times: int) -> None:
        self.words = word * times
        print("from print")
        print("from stderr", file=sys.stderr)
        subprocess.run(["sh", "-c", "echo from a child"], check=True)
        os.write(2, b"from C\n")

    def say(self) -> str:
        return self.words

    def surroundings(self) -> tuple[str, str | None, int, str]:
        return (
            type(self).__name__,
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            torch.get_num_threads(),
            os.environ["OMP_NUM_THREADS"],
        )


@pytest.fixture(scope="module")
def placed(ray_session: Session) -> Iterator[Spawner]:
    placed = ray_session.place(
        plan_placement(
            [RoleDemand("plain", 2, 0), RoleDemand("other", 2, 0)], share_devices=True, cpus_per_bundle=2, local_cpus=1
        )
    )
    yield placed
    placed.remove()


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=300)


def test_a_plain_class_becomes_an_actor_with_its_process_settled(placed: Spawner, ray_session: Session) -> None:
    handle = placed.spawn(Plain, "plain", 1, "ab", times=2)
    info = get(handle.describe.remote())
    assert get(handle.say.remote()) == "abab"
    # Ray, left alone, counts one thread to a slot of one CPU
    assert get(handle.surroundings.remote()) == (
        "Plain",
        "",
        2,
        "2",
    )
    assert info.pid != os.getpid()
    assert info.node_ip == ray.util.get_node_ip_address()
    assert info.fingerprint == ray_session.fingerprint
    assert Path(info.log_file).name == "plain-1.log"
    assert Path(info.log_file).read_text().splitlines() == ["from print", "from stderr", "from a child", "from C"]
    assert 1024 <= get(handle.free_port.remote()) < 65536
    ray.kill(handle)


@pytest.mark.slow
def test_without_a_log_folder_the_output_stays_with_ray(placed: Spawner, ray_session: Session, tmp_path: Path) -> None:
    elsewhere = Spawner(placed.seats, log_dir=tmp_path / "on another machine", packages=(), pulse_timeout_s=60)
    handle = elsewhere.spawn(Plain, "plain", 0, "a", times=1)
    assert get(handle.describe.remote()).log_file == ""
    assert not (tmp_path / "on another machine").exists()
    ray.kill(handle)


def test_an_actor_beside_the_seats_takes_no_cpu_and_logs_like_the_others(placed: Spawner) -> None:
    before = ray.available_resources()["CPU"]
    handle = placed.spawn_beside(Plain, "clerk", 0, "a", times=1)
    assert get(handle.describe.remote()).log_file.endswith("clerk-0.log")
    assert ray.available_resources()["CPU"] == before
    ray.kill(handle)


def test_an_unplanned_worker_is_a_defect(placed: Spawner) -> None:
    with pytest.raises(AssertionError, match=r"no slot was planned for plain\[2\]"):
        placed.spawn(Plain, "plain", 2, "a", times=1)


def test_a_log_holds_every_character_whatever_the_drivers_console_can_show(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from cluster.spawn import settle; settle(Path({str(tmp_path / 'worker.log')!r}), "
        "1, 0); print('reward \\u2581')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, timeout=60, check=True)
    assert (tmp_path / "worker.log").read_text(encoding="utf-8") == "reward ▁\n"
