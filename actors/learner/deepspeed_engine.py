"""DeepSpeed with fixed settings: trains a model under ZeRO 0-3, summing gradients over ranks instead of averaging them.

What it adds to DeepSpeed: the gradient is the SUM of the loss gradients of all ranks; a step happens on all ranks or on
none; every default that changes numbers is set explicitly and read back; nothing is compiled at start-up, so no C++
compiler is needed.

Precision by stage (DeepSpeed 0.19.8): bfloat16 has float32 master weights at every stage. From stage 1 on, micro-batch
gradients are also summed in float32. At stage 0 DeepSpeed can only sum them in bfloat16, so prefer stage 1 there.

Left out: DeepSpeed's schedulers, loss scaling, data loading, offloading and parallelism other than ZeRO.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from actors.config import LearnerConfig
from actors.device import Compute, assigned_compute
from actors.learner.fragments import Fragment, Working, fragments_of, numel_of, working_of

_BUCKET = 50_000_000  # number of elements in one collective
_PATIENCE = timedelta(days=1)  # no deadline in practice: the caller keeps its own


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The report on one optimiser step.

    grad_norm: global 2-norm of the gradient before clipping, 0 when skipped. skipped: the gradient was not finite on
    some rank, so no rank stepped.
    """

    grad_norm: float
    skipped: bool


class DeepSpeedEngine:
    """One rank of a gang that trains `model`.

    Every method that communicates must be called by all ranks in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        *,
        rank: int,
        ranks: int,
        address: str | None,
        port: int,
        timeout_s: float,
    ) -> None:
        """Join the gang at address:port, or use the process group that exists already, and shard the model.

        address: None where another library, such as Ray Train, has made the process group. timeout_s: bounds every
        collective, so a stopped peer raises here. It does not bound joining, because a rank may join late after loading
        its model for longer.

        Raises AssertionError when DeepSpeed started with other settings than asked for.
        """
        self.config = config
        self.rank = rank
        self.ranks = ranks
        self.compute = assigned_compute(config.gpus)
        self._model = model
        timeout = timedelta(seconds=timeout_s)
        # At every step ZeRO-3 calls collectives that torch has renamed; only DeepSpeed can fix these warnings.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.* is deprecated")
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # raised by the imports of other libraries
            deepspeed = _import_deepspeed(self.compute)
            _join(deepspeed, self.compute, rank, ranks, address, port)
            self.await_peers()
            _bound_collectives(timeout)
            settings = _settings(config, ranks)
            optimizer = _adamw(model, config)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._gathered = deepspeed.zero.GatheredParameters
        # bfloat16 at stage 0: DeepSpeed allocates AdamW's states by stepping once on zero gradients. The first real
        # step would then get the bias correction of the second, and be three quarters of its proper size.
        self._engine.basic_optimizer.state.clear()
        _bound_collectives(timeout)
        _assert_settings(self._engine, config, ranks)
        self._finite = torch.ones((), dtype=torch.bool, device=self.compute.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note_gradient)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward pass.

        With gradients on, `backward` of its result must follow before the next forward pass.
        """
        return self._engine(*inputs, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this rank's share of the gradient. last: the final micro-batch before `step`, the same on all ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks. Losses here are shares of one global sum, so the averaging is undone
        # here, and only here.
        self._engine.backward(loss * self.ranks)

    def step(self, learning_rate: float) -> StepReport:
        """Clip and apply the accumulated gradient, or drop it on all ranks if it is not finite on any rank."""
        stage0_norm = self._stage0_norm()  # measured first, because stepping clips and clears the gradient
        if not self._finite_everywhere() or (stage0_norm is not None and not math.isfinite(stage0_norm)):
            self.drop_gradients()
            return StepReport(grad_norm=0.0, skipped=True)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        before = self._engine.skipped_steps
        self._engine.step()
        # finite gradients whose norm overflows: found by DeepSpeed's own check, with the same result on all ranks
        if self._engine.skipped_steps > before:
            return StepReport(grad_norm=0.0, skipped=True)
        return StepReport(
            grad_norm=float(self._engine.get_global_grad_norm()) if stage0_norm is None else stage0_norm, skipped=False
        )

    def await_peers(self) -> None:
        """Wait until every rank of the process group has called this as often as this rank.

        It is for phases in which ranks may take different times: one writes the model, or reads from a slower disk. The
        ranks wait in the process group's store, not in a collective, so neither the deadline of collectives nor NCCL's
        watchdog applies. Left out: a deadline, because the caller keeps one. If rank 0 dies, the store dies with it,
        and the other ranks raise.
        """
        if self.ranks == 1:
            return
        store = c10d._get_default_store()
        meeting = f"raylign/meeting-{store.add(f'raylign/rank-{self.rank}', 1)}"
        if store.add(f"{meeting}/ranks", 1) == self.ranks:
            store.set(f"{meeting}/all", "1")
        store.wait([f"{meeting}/all"], _PATIENCE)

    def gather(self, values: Tensor) -> Tensor:
        """Collect the values of all ranks: (N,) on every rank becomes (ranks, N) on every rank."""
        out = [torch.empty_like(values) for _ in range(self.ranks)]
        torch.distributed.all_gather(out, values.contiguous())
        return torch.stack(out)

    @contextlib.contextmanager
    def full_parameters(self) -> Iterator[None]:
        """A context in which the model's parameters are whole on every rank, in the dtype the model computes in.

        All ranks enter it together. The parameters must not be changed in it.
        """
        parameters = list(self._model.parameters()) if self.config.zero_stage == 3 else []
        with self._gathered(parameters, enabled=bool(parameters)):
            yield

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> number of elements of every trainable parameter."""
        return {
            name: numel_of(parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad
        }

    def fragments(self) -> list[Fragment]:
        """The part of the training state that this rank holds; at stage 0 it is the whole state."""
        return fragments_of(self._model, self._optimizer, self._engine.basic_optimizer, self.rank)

    def own_fragments(self) -> list[Fragment]:
        """This rank's share of the training state; the shares of all ranks cover every trainable parameter once."""
        held = self.fragments()
        return [fragment.part(self.rank, self.ranks) for fragment in held] if self.config.zero_stage == 0 else held

    def working(self) -> Iterator[Working]:
        """The trainable parameters in the model's dtype, to be overwritten; call `drop_gradients` first."""
        return working_of(self._model, self.rank)

    def drop_gradients(self) -> None:
        """Drop all gradients accumulated since the last step, as DeepSpeed's own overflow branches do at each stage.

        It also clears what an update left behind that was interrupted between two steps. All ranks call it.
        """
        self._finite.fill_(True)
        self._engine.zero_grad()
        if self._optimizer is not self._engine.basic_optimizer:
            self._optimizer.zero_grad()
        stage = self.config.zero_stage
        # bfloat16 at stage 1 is BF16_Optimizer: cleared above
        if stage in (1, 2) and hasattr(self._optimizer, "averaged_gradients"):
            for group in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[group] = None
                self._optimizer.all_grad_tensors[group] = None
            self._optimizer._release_preflattened_grad_buffers()
            self._optimizer.micro_step_id = -1
        if stage == 3:
            self._optimizer.averaged_gradients = {}
            self._optimizer._pre_step()
            self._optimizer._partition_all_parameters()

    # ---- finiteness ----

    def _note_gradient(self, gradient: Tensor) -> None:
        # The sum is not finite if any element is not, and needs no synchronisation with the device. At every stage the
        # hook sees this micro-batch's own gradient, before DeepSpeed moves it into its buffers.
        self._finite.logical_and_(torch.isfinite(gradient.detach().sum(dtype=torch.float32)))

    def _finite_everywhere(self) -> bool:
        flag = self._finite.to(torch.int32)
        if self.ranks > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        self._finite.fill_(True)
        return bool(flag.item())

    def _stage0_norm(self) -> float | None:
        """The gradient norm under plain AdamW, for which DeepSpeed reports none; None where DeepSpeed reports it."""
        if self.config.zero_stage > 0 or self.config.dtype == "bfloat16":
            return None
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]))


def _import_deepspeed(compute: Compute) -> Any:
    """Import DeepSpeed; call it with stdout redirected to stderr, since its log handler keeps the stream it finds."""
    os.environ["DS_ACCELERATOR"] = compute.accelerator
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would compile its shared-memory collective with g++ at the first init: this takes 25-45 s, and fails
    # without g++. The collective only speeds up CPU ranks on one machine, and changes no bit. Declared incompatible, it
    # is not built, and DeepSpeed uses gloo throughout. Setting the whole table, which is read nowhere else, also avoids
    # probing every op, which runs compilers.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


def _join(deepspeed: Any, compute: Compute, rank: int, ranks: int, address: str | None, port: int) -> None:
    """Make the gang's process group, or use the one that exists already."""
    os.environ["LOCAL_RANK"] = "0"  # a process sees only its own device, even where Ray Train sets another local rank
    if torch.distributed.is_initialized():
        found = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        assert found == (rank, ranks), (
            f"one process belongs to one gang: it is rank {found[0]} of {found[1]}, told to be {rank} of {ranks}"
        )
        backend = str(torch.distributed.get_backend())
        assert compute.backend in backend, f"the process group must run on {compute.backend}, got {backend}"
    else:
        assert address is not None, "connect() needs an address where no process group exists"
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    # If the group exists already, this only makes DeepSpeed use it.
    deepspeed.init_distributed(compute.backend, auto_mpi_discovery=False, timeout=_PATIENCE, verbose=False)


def _bound_collectives(timeout: timedelta) -> None:
    """Set the deadline of every process group; DeepSpeed's own groups would keep torch's default of 30 minutes."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def _adamw(model: nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """Make torch's AdamW, since DeepSpeed's would be compiled; only matrices get weight decay, not biases or norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable, "weight_decay": 0.0}]
    if config.weight_decay > 0:
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_epsilon,
        fused=True,
    )


def _settings(config: LearnerConfig, ranks: int) -> dict[str, Any]:
    bf16 = config.dtype == "bfloat16"
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `backward` sets the boundaries, and losses arrive weighted
        "gradient_clipping": config.max_grad_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and config.zero_stage == 0 else "fp32"},
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": bf16,
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
        },
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_scatter": True,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "allgather_partitions": True,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _assert_settings(engine: Any, config: LearnerConfig, ranks: int) -> None:
    """Read back the settings that change numbers; DeepSpeed has changed defaults before (clipping in 0.19.3)."""
    bf16 = config.dtype == "bfloat16"
    expected = {
        "zero_optimization_stage": config.zero_stage,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "gradient_clipping": config.max_grad_norm,
        "bfloat16_enabled": bf16,
        "fp16_enabled": False,
        "torch_autocast_enabled": False,
        "postscale_gradients": True,
        "gradient_predivide_factor": 1.0,
        "zero_reduce_scatter": True,
        "zero_overlap_comm": False,
        "zero_contiguous_gradients": True,
        "zero_round_robin_gradients": False,
        "zero_force_ds_cpu_optimizer": False,
        "zero_use_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    found = {name: getattr(engine, name)() for name in expected}
    assert found == expected, f"DeepSpeed runs with {found}, asked for {expected}"
    assert engine.communication_data_type == torch.float32, (
        f"gradients must be reduced in float32, got {engine.communication_data_type}"
    )
    assert engine.gradient_average, "gradients must be averaged over ranks, or backward() would scale them wrongly"
    group = engine.optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["eps"]) == (tuple(config.betas), config.adam_epsilon), (
        f"AdamW runs with {group['betas']}, {group['eps']}"
    )
