"""The arguments of `raylign submit`, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.arguments.overrides import configuration
from pipeline.arguments.parsing import settings_parser
from pipeline.config.recipe import recipe_path
from pipeline.submission.submission import ACTIONS, Submission, labels_of


def parse_submission(rest: Sequence[str]) -> Submission:
    """What is asked: TARGET is a recipe or, with --attach or --stop, the folder of a submitted run.

    Raises ValueError for whatever is wrong with it.
    """
    if not rest or rest[0].startswith("-"):
        raise ValueError(
            "TARGET: `raylign submit` needs one, a recipe or, with --attach or --stop, the folder of a run"
        )
    target, rest = rest[0], rest[1:]
    program = f"raylign submit {target}"
    parser = settings_parser(program, "--address URL --run-dir DIR [--no-wait] [--section.field value ...]")
    parser.add_argument("--address", default="")
    parser.add_argument("--run-dir", default="")
    parser.add_argument("--until", choices=ACTIONS, default=ACTIONS[0])
    parser.add_argument("--no-wait", dest="wait", action="store_false")
    parser.add_argument("--python", default="python")
    parser.add_argument("--driver-cpus", type=float, default=0.0)
    parser.add_argument("--driver-label", nargs="+", action="extend", default=[])
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--attach", action="store_true")
    act.add_argument("--stop", action="store_true")
    known, overrides = parser.parse_known_args(rest)
    if known.attach or known.stop:
        parser.parse_args(rest)  # there are no settings to override
        return Submission.of(
            address=known.address, run_dir=known.run_dir or target, what="attach" if known.attach else "stop"
        )
    path = recipe_path(target)
    return Submission.of(
        address=known.address,
        run_dir=known.run_dir,
        what=known.until,
        recipe=path.stem,
        config=configuration(path, known.algorithm, overrides, program),
        python=known.python,
        cpus=known.driver_cpus,
        labels=labels_of(known.driver_label),
        wait=known.wait,
    )
