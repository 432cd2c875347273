"""Prints how much the driver's peak memory grows, in MB, when a step has ten times the tokens, and when somebody
fetches them.

A process of its own, so that the peak is the driver's and nobody else's. Run: python tests/driver_memory.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa

from cluster.config import ClusterConfig
from cluster.session import Session
from driver_setup import config, fake_driver
from forked_workers import forked_workers
from pipeline.loop.driver import Driver


def peak_mb() -> float:
    """Of this program: getrusage's figure would be at least the size of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Fetching(Driver):
    """The mistake the test is for: a driver that looks into the experience."""

    def learn(self, assembled):  # type: ignore[no-untyped-def]
        import ray

        lists = [
            column.combine_chunks().flatten()
            for column in ray.get(assembled.experience, timeout=60).columns
            if column.type == pa.list_(pa.float32())
        ]
        self.kept = [values.to_numpy().copy() for values in lists]
        return super().learn(assembled)


def run(session: Session, folder: Path, length: int) -> float:
    with fake_driver(session, config(prompts=1000, chunk=500, steps=2), folder, length=length) as driver:
        driver.run(folder / "policy")
    return peak_mb()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    packages, patient = ("cluster", "actors", "pipeline"), ClusterConfig(address="local", start_timeout_s=300)
    with (
        forked_workers(),
        Session(
            ClusterConfig(address="local", start_timeout_s=300), folder / "log", packages=packages, local_cpus=8
        ) as session,
    ):
        once = run(session, folder / "once", length=300)
        tenfold = run(session, folder / "tenfold", length=3000)
        import driver_setup

        driver_setup.Driver = Fetching  # type: ignore[attr-defined, misc]
        fetched = run(session, folder / "fetched", length=3000)
    print(f"tenfold {tenfold - once:.1f} fetched {fetched - tenfold:.1f}")
