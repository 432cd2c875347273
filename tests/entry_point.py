"""`python -m pipeline ARGUMENTS` as a user's shell runs it, and what came of it.

An interpreter that starts and imports what a command needs takes longer than most commands, so they are forked from one
that has done so already. From the arguments to the exit code all else is as it is in a process of its own, which
`raylign_afresh` starts.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# should a run begin after all, it ends here
NOWHERE = (
    "--cluster.address",
    "127.0.0.1:1",
    "--cluster.start-timeout-s",
    "1",
)
# none of them is heavy: see test_imports
_PARSING = (
    "pipeline.plan.plan",
    "pipeline.tasks.walks",
    "rich.console",
    "tyro",
)
_RUNNING = (
    "actors.models.causal_lm",
    "pipeline.run.replay",
    "pipeline.run.start",
    "transformers.models.gpt2.modeling_gpt2",
)

_FORK = """
import importlib, json, os, runpy, sys, traceback
from pathlib import Path
for module in sys.argv[1:]:
    importlib.import_module(module)
for line in sys.stdin:
    row = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(row["cwd"])
        os.environ.update(row["environment"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a command that reads must not wait for the next command
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(row["told"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["raylign", *row["arguments"]]
        code = 0
        try:
            runpy.run_module("pipeline", run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        Path(row["told"] + "modules").write_text(" ".join({name.partition(".")[0] for name in sys.modules}))
        sys.stdout.flush()
        os._exit(code)  # tidying up what torch has imported would take a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a command printed, its exit code, and the packages it imported."""

    out: str
    err: str
    code: int
    imported: set[str]


class Interpreter:
    """A process that has imported some modules, and forks a command whenever it is asked to."""

    def __init__(self, *modules: str) -> None:
        self._told = tempfile.TemporaryDirectory()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORK, *modules],
            stdin=pipe,
            stdout=pipe,
            env=_environment(),
            text=True,
            cwd=self._told.name,
        )

    def run(self, *arguments: str, cwd: Path, **environment: str) -> Said:
        """`python -m pipeline ARGUMENTS` in the folder `cwd`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        told = Path(self._told.name)
        self._process.stdin.write(
            json.dumps({"arguments": arguments, "cwd": str(cwd), "environment": environment, "told": f"{told}/"}) + "\n"
        )
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Said(
            out=(told / "out").read_text(),
            err=(told / "err").read_text(),
            code=code,
            imported=set((told / "modules").read_text().split()),
        )

    def close(self) -> None:
        self._process.kill()  # to end by itself would take it seconds
        self._process.communicate()
        self._told.cleanup()


@functools.cache
def _interpreter(*modules: str) -> Interpreter:
    """One for the whole session, with these modules."""
    interpreter = Interpreter(*modules)
    atexit.register(interpreter.close)
    return interpreter


def raylign(*arguments: str, cwd: Path, **environment: str) -> Said:
    """`python -m pipeline ARGUMENTS` in the folder `cwd`, forked before anything heavy is imported."""
    return _interpreter(*_PARSING).run(*arguments, cwd=cwd, **environment)


def raylign_warm(*arguments: str, cwd: Path, **environment: str) -> Said:
    """The same, forked from an interpreter that has imported torch and a model already, but not Ray."""
    return _interpreter(*_RUNNING).run(*arguments, cwd=cwd, **environment)


def raylign_afresh(*arguments: str, cwd: Path) -> Said:
    """The same in an interpreter of its own."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", *arguments]
    done = subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    err = "".join(line for line in lines if not line.startswith("import time:"))
    return Said(out=done.stdout, err=err, code=done.returncode, imported=imported)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
