"""A killed manager, end to end: a real Ray actor, which its gang rebuilds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from actors.manager.manager import Manager
from actors.manager.option_head import OptionHead
from actors.manager.reports import ManagerReport, ManagerSpec
from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Fault, RunError
from cluster.gang import Gang
from cluster.placement import RoleDemand, plan_placement
from cluster.session import Session
from cluster.spawn import Spawner
from manager_helpers import WIDTH, make_manager, make_turns

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def placed(ray_session: Session) -> Iterator[Spawner]:
    placed = ray_session.place(
        plan_placement([RoleDemand("manager", 1, 0)], share_devices=True, cpus_per_bundle=1, local_cpus=1)
    )
    yield placed
    placed.remove()


def test_a_killed_manager_is_rebuilt_from_its_last_save_and_goes_on_to_the_same_bits(
    ray_session: Session, placed: Spawner, tmp_path: Path
) -> None:
    here = make_manager()
    spec = ManagerSpec(width=WIDTH, config=here.config, seed=5)
    tables = []
    for seed in range(3):
        tables.append(make_turns(seed=seed, head=OptionHead(here.weights())))
        here.update(tables[-1])
    expected = here.save(str(tmp_path / "here")).file

    gang = Gang(
        "manager",
        lambda rank: placed.spawn(Manager, "manager", rank, spec=spec, rank=rank, ranks=1, timeout_s=60.0),
        1,
        Pump(),
        ClusterConfig(ready_timeout_s=240, call_timeout_s=60),
        ray_session.fingerprint,
    )

    def update(table: pa.Table) -> ManagerReport:
        [report] = gang.call("update", lambda handle, _: handle.update.remote(table))
        assert isinstance(report, ManagerReport)
        return report

    gang.start()
    try:
        [ready] = gang.connect()
        assert ready == Manager.connect(here)
        update(tables[0])
        [saved] = gang.call("commit", lambda handle, _: handle.save.remote(str(tmp_path / "commit")))
        update(tables[1])
        [worker] = gang.call("describe", lambda handle, _: handle.describe.remote())
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RunError) as lost:
            update(tables[2])
        assert (lost.value.who, lost.value.fault) == ("manager[0]", Fault.WORKER_LOST)

        gang.restart()
        assert gang.connect() == [ready]
        gang.call("restore", lambda handle, _: handle.restore.remote(str(tmp_path / "commit"), [saved.file.name]))
        reports = [update(table) for table in tables[1:]]
        assert all(report.ratio_deviation < 1e-5 for report in reports)
        [after] = gang.call("commit", lambda handle, _: handle.save.remote(str(tmp_path / "after")))
        assert after.file == expected
    finally:
        gang.close()
