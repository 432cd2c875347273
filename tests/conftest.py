"""Fixtures of the whole suite: one local Ray, and tiny models that load in milliseconds."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from cluster import imports
from cluster.config import ClusterConfig
from cluster.session import Session
from forked_workers import forked_workers
from random_inputs import QUICK

TESTS = Path(__file__).resolve().parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: tiny models, for which more threads only wait for each other
)
# Ray's workers inherit this: they import the sources, and the classes that tests define, as pytest does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
)

# No input has a deadline, which is 200 ms unless told otherwise: a machine may be slow, or stand still for a moment.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(QUICK, parent=settings.get_profile("default"), max_examples=30)

ACTORS = "tests/test_actors_"  # the files whose tests share a pair of gloo ranks and need no Ray
LONGEST = (
    "test_cluster_nodes",
    "test_pipeline_resume",
    "test_pipeline_run",
    "test_pipeline_job",
    "test_pipeline_driver",
    "test_pipeline_bad_input",
    "test_pipeline_mirror",
)


def pytest_configure() -> None:
    """A worker of pytest-xdist ignores Ctrl-C; tests that send one to themselves expect what Python does with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: then no worker is left alone with it at the end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: -1 if item.nodeid.startswith(ACTORS) else rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take the tests file by file, since a file's tests share fixtures; all files of the actors
    count as one.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return ACTORS if nodeid.startswith(ACTORS) else str(super()._split_scope(nodeid))

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _forget_user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that one test wrote and imported must not be what the next test finds under the same name, nor the
    folder that it lay in be looked into.
    """
    before, written = set(sys.modules), str(tmp_path_factory.getbasetemp())
    path, roots = list(sys.path), list(imports._roots)
    yield
    sys.path[:], imports._roots[:] = path, roots
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def _seats_are_given_back() -> Iterator[None]:
    """What a file's tests have killed in the middle may keep its seats, and the next file counts them."""
    yield
    if "ray" not in sys.modules:
        return
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if ray.is_initialized():
        for name, group in placement_group_table().items():
            if group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One local Ray for all tests; it counts 16 CPUs, whatever the machine has."""
    with (
        forked_workers(),
        Session(
            ClusterConfig(address="local", start_timeout_s=180),
            tmp_path_factory.mktemp("log"),
            packages=("cluster",),
            local_cpus=16,
        ) as session,
    ):
        _warm_up()
        yield session


def _warm_up() -> None:
    """The first worker waits until the process that it is forked from has imported the libraries, which takes a slow
    machine a minute: longer than a test about workers gives a worker to start.
    """
    import ray

    class First:
        def answer(self) -> None:
            """It lives."""

    handle = ray.remote(First).options(num_cpus=0).remote()
    ray.get(handle.answer.remote(), timeout=600)
    ray.kill(handle)


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model_factory(layers=, width=, seed=): a folder with a random GPT-2 and a byte-level tokenizer in Hugging
    Face format.
    """

    def make(*, layers: int = 2, width: int = 32, seed: int = 0) -> Path:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        tokenizer = _byte_tokenizer()
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=264,  # a multiple of 8, hence more words than the tokenizer's 258
            n_positions=64,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp(f"gpt2-{layers}x{width}-{seed}-")
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_model_factory: Callable[..., Path]) -> Path:
    """A GPT-2 of 2 layers, 32 wide, 2 heads, 64 positions."""
    return tiny_model_factory()


def _byte_tokenizer() -> Any:
    """256 bytes, an end-of-text token, a padding token; no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
