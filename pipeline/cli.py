"""The command line: it parses and checks a command before it imports Ray, torch or DeepSpeed.

    raylign COMMAND [RECIPE] [--run-dir DIR] [--section.field value ...]

The options that override settings are generated from the types of the configuration (tyro), so there is no second list
of options.

Exit codes: 0 done; 1 the run failed, or a replay differs; 2 the command or its configuration is wrong; 129, 130 and 143
stopped by SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.imports import use_roots
from cluster.signals import postponed
from cluster.stopping import Stopped, StopRequest, name_of
from pipeline.arguments.parsing import UNTIL, Command, parse
from pipeline.arguments.usage import COMMANDS, HELP, VERSION, has_settings, usage, usage_of, version
from pipeline.observe.output import steady_output

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Errors are printed on stderr, in one screen. An error of the user or of the machine is printed without a traceback.
    """
    with steady_output(), StopRequest() as stop:
        try:
            with stop.at_once():
                return _main(list(sys.argv[1:] if arguments is None else arguments), stop)
        except KeyboardInterrupt:
            number = stop.number or signal.SIGINT
            print(f"raylign: stopped by {name_of(number)}", file=sys.stderr)
            return 128 + number


def _main(arguments: list[str], stop: StopRequest) -> int:
    if not arguments or arguments[0] in (*HELP, "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] in VERSION:
        print(f"raylign {version()}")
        return 0
    if arguments[0] in COMMANDS and {*HELP} & {*arguments[1:]}:
        print(usage_of(arguments[0]), end="")
        if not has_settings(arguments):
            return 0
        print("\nits settings:\n")
    try:
        use_roots([_here()])  # import paths of a user's code begin in the current folder or the recipe's
        if arguments[0] == "submit":
            return _submit(arguments[1:])
        if arguments[0] == "init":
            from pipeline.run.init import init, parse_init

            print(init(parse_init(arguments[1:])))
            return 0
        if arguments[0] == "push":
            return _push(arguments[1:])
        command = parse(arguments)
    except ValueError as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2
    return run(command, stop)


def _here() -> str:
    """The current folder. Raises ValueError when it no longer exists."""
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise ValueError("the current folder must exist, and it was removed; change to another one") from error


def run(command: Command, stop: StopRequest) -> int:
    """Carry out a parsed command; returns the exit code."""
    from rich.console import Console

    from cluster.faults import RunError

    console = Console()
    try:
        return _carry_out(command, console, stop)
    except Stopped as stopped:
        print(f"raylign: {stopped}; nothing of it is kept, and the same command begins it again", file=sys.stderr)
        return 128 + stopped.number
    except (ValueError, RunError) as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _carry_out(command: Command, console: Console, stop: StopRequest) -> int:
    match command.name:
        case "plan":
            from pipeline.plan.plan import show

            show(command.config, console, command.run_dir)
        case "ledger":
            from pipeline.report.ledger import show_account

            show_account(_given(command), command.config, console)
        case "replay":
            from pipeline.run.replay import replay

            return 0 if replay(command.config, _given(command), command.step, console) else 1
        case "chat":
            with postponed():
                from pipeline.chat.terminal import chat_with
            assert command.chat is not None
            chat_with(command.config, _given(command), command.chat, console)
        case "evaluate":
            with postponed():
                from pipeline.run.compare import compare
            assert command.comparison is not None
            compare(command.config, command.comparison, console, stop)
        case _:
            return _run_stages(command, console, stop)
    return 0


def _submit(arguments: list[str]) -> int:
    """Submit a run to a cluster, or attach to one; returns its exit code. However this ends, the job goes on."""
    from cluster.faults import RunError

    try:
        from pipeline.arguments.submission import parse_submission
        from pipeline.submission.submit import carry_out

        return carry_out(parse_submission(arguments), _say, _write)
    except (ValueError, RunError) as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _push(arguments: list[str]) -> int:
    """Upload the policy of a run; returns the exit code."""
    from cluster.faults import RunError

    try:
        from pipeline.run.push import parse_push, push

        print(push(parse_push(arguments)))
        return 0
    except (ValueError, RunError) as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _say(line: str) -> None:
    print(f"raylign submit: {line}", flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _run_stages(command: Command, console: Console, stop: StopRequest) -> int:
    """Begin a new run or resume an old one; returns the exit code.

    If the run ends early, its results so far are kept, and the last line printed says how to go on.
    """
    run_dir = _run_dir(command)
    from cluster.faults import RunError

    if command.push:
        from pipeline.run.push import check_push

        check_push("--push", command.push)
    print(_what_it_does(command, run_dir), flush=True)
    with postponed():  # a stop in the middle of an import would leave a broken module
        from pipeline.folder.standing import how_it_ends
        from pipeline.run.start import resume, run_stages
    again = f"raylign resume {shlex.quote(str(run_dir))}"
    try:
        if command.name == "resume":
            resume(command.config, run_dir, command.allowed, console, stop)
        else:
            run_stages(command.config, run_dir, console, until=UNTIL[command.name], stop=stop)
    except Stopped as stopped:
        print(f"raylign: {stopped}; to go on: {again}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:  # before the folder was taken, or after the last stage
        number = stop.number or signal.SIGINT
        print(f"raylign: stopped by {name_of(number)}. {how_it_ends(run_dir, again)}", file=sys.stderr)
        return 128 + number
    except RunError as error:
        print(f"raylign: {error}\n{how_it_ends(run_dir, again)}", file=sys.stderr)
        return 1
    return _push([str(run_dir), command.push]) if command.push else 0


def _what_it_does(command: Command, run_dir: Path) -> str:
    """The first line that a run prints, before anything that takes long: its stages and its folder."""
    if command.name == "resume":
        return f"raylign resume: what is left of {run_dir}"
    from pipeline.folder.manifests import stages_of
    from pipeline.folder.standing import STAGES

    stages = [
        STAGES[stage] + (f" ({command.config.steps} steps)" if stage == "rl" else "")
        for stage in stages_of(command.config, UNTIL[command.name])
    ]
    named = command.name if command.name == command.recipe else f"{command.name} {command.recipe}"
    return f"raylign {named}: {', '.join(stages)} -> {run_dir}"


def _given(command: Command) -> Path:
    assert command.run_dir is not None
    return command.run_dir.absolute()


def _run_dir(command: Command) -> Path:
    """The absolute path of the run folder.

    Raises ValueError in a Ray job whose run folder is not given as an absolute path: a relative path would lie in Ray's
    package folder, which Ray deletes.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for the entrypoint of a job
    if in_job and (command.run_dir is None or not command.run_dir.is_absolute()):
        given, name = command.run_dir or "none", "RUN_DIR" if command.name == "resume" else "--run-dir"
        raise ValueError(
            f"{name}: must be an absolute path in a Ray job, got {given}; a relative one would lie in Ray's own "
            "package folder"
        )
    return (command.run_dir or Path("runs") / f"{command.recipe}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
