"""The texts of `raylign --help` and `raylign COMMAND --help`, and the list of commands."""

from __future__ import annotations

from pathlib import Path

HELP, VERSION = ("-h", "--help"), ("-V", "--version")
USAGE = """\
raylign: reinforcement learning from human feedback for causal language models, on Ray

  raylign quickstart                 the whole chain in a small world: fine-tune, reward model, PPO, evaluation
  raylign run RECIPE                 every stage of a recipe: a TOML file, or one of those below
  raylign sft|reward|train RECIPE    its stages up to fine-tuning, the reward model, or reinforcement learning
  raylign init DIR                   a commented recipe, a reward function and a task to start from, into a new folder
  raylign plan RECIPE                what a recipe would run: processes, placement, memory, duration; starts nothing

  raylign submit RECIPE              a run as a job of a Ray cluster, followed to its end; again: attach, or go on

  raylign resume RUN_DIR             go on with a run that was stopped or broke off, from its last commit
  raylign resume URL --run-dir NEW   the same elsewhere, with a run that was copied to cluster.storage
  raylign ledger RUN_DIR             the account of a run: what became of every sample
  raylign replay RUN_DIR --step N    compute a step again from its logged experience and compare with what was recorded
  raylign chat RUN_DIR               talk with a run's baseline and policy, side by side; --web: a local page
  raylign evaluate RUN_DIR|RECIPE    two models on held-out prompts; of a run, its policy and what it began from
  raylign push RUN_DIR owner/name    the policy of a run, with its model card, to the Hugging Face hub; private

  --run-dir DIR                      where the run is written (default runs/<recipe>-<time>); in the folder of a run,
                                     only what has changed is done again
  --section.field value              override a setting; `raylign run RECIPE --help` lists them all
  --policy, --baseline DIR           with evaluate: other models; --reward-model DIR: another judge; --out DIR
  --push owner/name                  with run, quickstart, resume: afterwards as `raylign push` does
  --allow-change KEY                 with resume: accept that this setting differs from what the run was begun with
  --help, --version                  `raylign COMMAND --help`: that command's own options

recipes: {recipes}
"""
_RUN_OPTIONS = {
    "--run-dir DIR": "where the run is written; default runs/<recipe>-<time>. In the folder of a run, only what has "
    "changed is done again",
    "--section.field value": "override a setting of the recipe; `raylign {name} {of} --help` lists them all",
}
_PUSH = {
    "--push owner/name": "upload the policy to the Hugging Face hub when all is done, as `raylign push` does; private",
}
_CHANGES = {
    "--run-dir NEW": "with the URL of a run's storage: an empty folder, into which the run is fetched first",
    "--section.field value": "override a setting; what would change the result must be allowed",
    "--allow-change KEY ...": "accept that these settings differ from what the run was begun with; `data` and `model`: "
    "that what the files hold differs",
}
_COMPARISON = {
    "--policy DIR": "the model that is judged; default the run's policy",
    "--baseline DIR": "the model that it is compared with; default the one that the run began from",
    "--reward-model DIR": "the judge beside the rule; default the run's",
    "--out DIR": "where the result is written; default a new folder in the run's, or in runs/",
    "--section.field value": "override a setting, such as --evaluation.prompts 100",
}
_SUBMISSION = {
    "--address URL": "the dashboard of the cluster, http://HEAD:8265",
    "--run-dir DIR": "an absolute path on the cluster, which all its nodes see; submitted again, the run goes on there",
    "--until STAGE": "run (everything, the default), sft, reward or train",
    "--no-wait": "return once the job is submitted",
    "--attach": "TARGET is a run folder: follow its job to the end. Ctrl-C leaves the job alone",
    "--stop": "TARGET is a run folder: stop its job, which commits first",
    "--python PATH": "the interpreter on the cluster; default python",
    "--driver-cpus N": "CPUs of the node that the job's driver is placed on; default: the head",
    "--driver-label K=V ...": "labels of that node, such as ray.io/market-type=on-demand",
    "--section.field value": "override a setting of the recipe",
}
COMMANDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "quickstart": (
        "",
        "the whole chain in a small world: fine-tune, sample and compare, reward model, PPO, evaluation",
        _RUN_OPTIONS | _PUSH,
    ),
    "run": ("RECIPE", "every stage of a recipe: a TOML file, or one of {recipes}", _RUN_OPTIONS | _PUSH),
    "sft": ("RECIPE", "a recipe up to fine-tuning", _RUN_OPTIONS),
    "reward": ("RECIPE", "a recipe up to the reward model", _RUN_OPTIONS),
    "train": ("RECIPE", "a recipe up to reinforcement learning, without the evaluation", _RUN_OPTIONS),
    "init": ("DIR", "a commented recipe, a reward function and a task to start from, into a new or empty folder", {}),
    "plan": (
        "RECIPE",
        "what a recipe would run: processes, placement, batch arithmetic, memory; starts nothing",
        _RUN_OPTIONS,
    ),
    "submit": (
        "RECIPE|RUN_DIR",
        "a run as a job of a Ray cluster: send this folder, follow the log, exit as the job does",
        _SUBMISSION,
    ),
    "resume": (
        "RUN_DIR|URL",
        "go on with a run that was stopped or broke off, in whichever stage, from its last commit or checkpoint",
        _CHANGES | _PUSH,
    ),
    "ledger": ("RUN_DIR", "the account of a run: what became of every sample", {}),
    "replay": (
        "RUN_DIR",
        "compute a step's advantages and losses again, offline, and compare with what was recorded",
        {"--step N": "which step, from 0; it must be given"},
    ),
    "chat": (
        "RUN_DIR",
        "the baseline's and the policy's answers side by side as they are sampled, with their rewards",
        {
            "--temperature X": "of sampling; 0 takes the likeliest token; default the recipe's",
            "--max-tokens N": "longest reply; default the recipe's sampling.max_new_tokens",
            "--seed N": "of all chance; default 0",
            "--web": "a page on this machine instead of the terminal; its address is printed",
            "--port N": "of the page; default any free one",
        },
    ),
    "evaluate": ("RUN_DIR|RECIPE", "two models on held-out prompts: reward, win rate, KL, best-of-n", _COMPARISON),
    "push": (
        "RUN_DIR owner/name",
        "upload the policy of a run with its model card to the Hugging Face hub: weights, configuration, tokenizer, "
        "README.md, nothing else. The token is read from HF_TOKEN, or is that of `hf auth login`",
        {"--public": "a repository that is made is public; default private. One that exists stays as it is"},
    ),
}


def usage() -> str:
    """Of all commands."""
    return USAGE.format(recipes=", ".join(bundled()))


def has_settings(arguments: list[str]) -> bool:
    """Whether --help can list them: behind a recipe or the folder of a run."""
    name, rest = arguments[0], arguments[1:]
    return "--section.field value" in COMMANDS[name][2] and (name == "quickstart" or rest[0] not in HELP)


def usage_of(name: str) -> str:
    """Of one command, without the settings of its recipe."""
    of, what, options = COMMANDS[name]
    words = {"name": name, "of": of or "", "recipes": ", ".join(bundled())}
    usage = " ".join(
        filter(
            None,
            ("usage: raylign", name, of, *(f"[{option}]" if option != "--step N" else option for option in options)),
        )
    )
    lines = [usage, "", what.format(**words)]
    if options:
        lines += ["", *(f"  {option:<24}{text.format(**words)}" for option, text in options.items())]
    return "\n".join(lines) + "\n"


def version() -> str:
    """Of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("raylign")
    except metadata.PackageNotFoundError:  # sources that were shipped, not installed, as with a Ray job
        return "(not installed)"


def bundled() -> list[str]:
    """The recipes that come with the package, by name."""
    return sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.toml"))
