"""The actor that runs a `TorchTrainer` and passes messages between its workers and the driver.

    driver --fit--> supervisor --TorchTrainer.fit, in a thread--> workers (worker.py)
       ^---events-------'  ^-----------------------tell---------------'

`TorchTrainer.fit` cannot be interrupted. But this actor owns the workers, so they end with it: killing it ends the
training, whatever the training does. Their placement groups are removed by the driver (reservations.py).

Consumes: events of workers. Waits for: the end of `fit`. Unblocked by: that end, or being killed. Left out: deadlines,
because the driver keeps them.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.faults import Fault, RunError, classify, last_lines
from cluster.watchdog import RankLog
from pipeline.training.events import Event, Failed, Phase, WorkerReady
from pipeline.training.reservations import hold
from pipeline.training.worker import START, TrainingSetup, train_loop_per_worker

STORAGE = "ray-train"  # Ray Train's own folder; nothing is kept there, since the checkpoints are our own


class Supervisor:
    """Runs one training, passes its events to the driver, and the driver's request to stop to its workers."""

    def __init__(self) -> None:
        self._untold: list[Event] = []
        self._is_new = asyncio.Event()
        self._is_asked_to_stop = False
        self._phase = START
        self._logs: dict[int, RankLog] = {}

    async def fit(self, setup: TrainingSetup, lock: Path) -> None:
        """Run the training to its end. Rank 0 sends how it ended, or this actor does if no worker is left.

        lock: held from before anything is reserved until this process ends (reservations.py).
        """
        import ray

        self._lock = hold(lock)
        me = ray.get_runtime_context().current_actor
        if failure := await asyncio.to_thread(self._fit, setup, me):
            await self.tell(failure)

    async def events(self) -> list[Event]:
        """Wait for new events and return them; every event is returned once."""
        await self._is_new.wait()
        self._is_new.clear()
        told, self._untold = self._untold, []
        return told

    async def ask_to_stop(self) -> None:
        """Ask the workers to finish the current updates, write a checkpoint and leave."""
        self._is_asked_to_stop = True

    async def is_asked_to_stop(self) -> bool:
        return self._is_asked_to_stop

    async def tell(self, event: Event) -> bool:
        """Pass an event on to the driver; returns whether the training is asked to stop."""
        match event:
            case WorkerReady():
                self._logs[event.rank] = RankLog.now(event.log_file)
            case Phase():
                self._phase = event.name
        self._untold.append(event)
        self._is_new.set()
        return self._is_asked_to_stop

    def _fit(self, setup: TrainingSetup, me: Any) -> Failed | None:
        os.environ.update(_ray_train_settings(setup))  # before Ray Train is imported
        from ray.train import ControllerError, WorkerGroupError

        job = setup.job
        try:
            _trainer(setup, me).fit()
        except WorkerGroupError as error:
            explained = explain_loss(job.name, self._phase, error.worker_failures, self._logs)
            return Failed(error=explained, trace=traceback.format_exc())
        except Exception as error:  # noqa: BLE001 - told to the driver, whatever it is
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
                problem = f"no room for {job.learner.ranks} worker(s) of the {job.name} training"
                remedy = (
                    "Other jobs hold the CPUs or GPUs that it needs; wait until they end, "
                    "or raise cluster.place_timeout_s where an autoscaler has yet to add nodes."
                )
                return Failed(error=RunError("cluster", "placement", problem, remedy))
            told = RunError(job.name, self._phase, f"Ray Train gave up:\n{last_lines(cause)}\n")
            return Failed(error=told, trace=traceback.format_exc())
        return None


def explain_loss(name: str, phase: str, failures: Mapping[int, Exception], logs: Mapping[int, RankLog]) -> RunError:
    """The error of the rank that is nearest to the root cause, when the workers were lost once too often."""

    def fault_of(rank: int) -> tuple[Fault, str]:
        fault = classify(failures[rank])
        if line := logs[rank].watchdog_line() if rank in logs else "":
            return Fault.PEER_LOST, line
        # Workers raise only when they have lost a peer. Any other error is Ray Train's own, about a process that died.
        return fault if fault.of_a_process else Fault.WORKER_LOST, last_lines(failures[rank])

    faults = {rank: fault_of(rank) for rank in failures}
    rank = min(faults, key=lambda rank: (faults[rank][0].remoteness, rank))
    fault, said = faults[rank]
    cause = f"{fault.value}:\n{said}\n"
    return RunError(f"{name}[{rank}]", phase, cause, "See its log, and cluster.max_rebuilds.", fault)


def _trainer(setup: TrainingSetup, me: Any) -> Any:
    from ray import train
    from ray.train.torch import TorchConfig

    from pipeline.training.small_trainer import SmallTorchTrainer

    cluster, learner = setup.cluster, setup.job.learner
    resources = {"CPU": setup.bundle.cpus} | ({"GPU": setup.bundle.gpus} if learner.gpus else {})
    environment = {
        "OMP_NUM_THREADS": str(setup.threads),
        "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "0",  # each rank sees its own GPU alone, as everywhere else here
    }
    return SmallTorchTrainer(
        train_loop_per_worker,
        is_alone=setup.is_alone,
        train_loop_config={"setup": setup, "supervisor": me},
        torch_config=TorchConfig(
            backend="nccl" if learner.gpus else "gloo", timeout_s=max(1, round(cluster.peer_timeout_s))
        ),
        scaling_config=train.ScalingConfig(
            num_workers=learner.ranks, use_gpu=bool(learner.gpus), resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=STORAGE,
            storage_path=str(setup.folder),
            failure_config=train.FailureConfig(
                max_failures=cluster.max_rebuilds, controller_failure_limit=cluster.max_rebuilds
            ),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _ray_train_settings(setup: TrainingSetup) -> dict[str, str]:
    """The settings that Ray Train reads only from environment variables."""
    return {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of a training waits for this check
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{setup.cluster.pulse_timeout_s:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{setup.cluster.place_timeout_s:g}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(
            int(not setup.is_alone)
        ),  # a process of its own, useless on one node
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",  # it would take the root logger
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # `fit` blocks, but in its own thread
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a user's modules are imported from where they stand
    }
