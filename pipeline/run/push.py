"""The command `raylign push RUN_DIR owner/name`, and `--push owner/name`: a run's policy to the Hugging Face hub.

Only what `from_pretrained` reads and the model card are uploaded, in one commit: no logs, no data, no optimiser. The
repository is private unless asked otherwise. The token comes from the environment (HF_TOKEN) or from `hf auth login`;
it is never an argument, and appears in no message.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.faults import RunError
from pipeline.report.card import CARD

T = TypeVar("T")
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_FILES = frozenset(
    {
        CARD,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushCommand:
    """A parsed command. repository: `owner/name`. public: whether a new repository is public."""

    run_dir: Path
    repository: str
    public: bool = False


def parse_push(arguments: list[str]) -> PushCommand:
    """Run folder, repository and --public. Raises ValueError for whatever is wrong with them."""
    from actors.hub import expand

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--public", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    if len(rest) != 2 or any(part.startswith("-") for part in rest):
        raise ValueError(
            f"RUN_DIR: `raylign push` needs the folder of a run and a repository, owner/name, got "
            f"{' '.join(rest) or 'none'}"
        )
    run_dir = Path(expand(rest[0]))
    check_repository("REPOSITORY", rest[1])
    policy_files(run_dir)
    return PushCommand(run_dir=run_dir, repository=rest[1], public=known.public)


def check_repository(option: str, repository: str) -> None:
    """Raises ValueError unless it has the form `owner/name` that the hub accepts."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    rule = f"{option}: must be a repository of the Hugging Face hub, owner/name, got {repository!r}"
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(rule)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{rule}: {error}") from error


def check_push(option: str, repository: str) -> str:
    """Check before a run starts that its policy can be pushed when it is done; returns the name of the user.

    It asks the hub who the token belongs to, and makes nothing there. Raises ValueError for a name that is none, no
    token, or a token that the hub does not accept.
    """
    from huggingface_hub import HfApi, get_token

    check_repository(option, repository)
    if not get_token():
        raise ValueError(
            f"{option}: must have a token of the Hugging Face hub with the right to write, got none; set HF_TOKEN, or "
            "run `hf auth login`"
        )
    try:
        return str(_asked("whoami", lambda: HfApi().whoami())["name"])
    except RunError as error:
        raise ValueError(
            f"{option}: cannot push to {repository!r}: {error.cause}; check HF_TOKEN and the network"
        ) from error


def policy_files(run_dir: Path) -> list[Path]:
    """The files of a run's policy that are uploaded, sorted by name. Raises ValueError when there is no policy."""
    folder = run_dir / "policy"
    found = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_file() and (path.name in _FILES or path.name.endswith(_WEIGHTS))
    )
    if not any(path.name.endswith(".safetensors") for path in found):
        raise ValueError(
            f"RUN_DIR: must be the folder of a run with a policy, got {run_dir}, which has no "
            "policy/*.safetensors; it is written at the end of reinforcement learning"
        )
    return found


def push(command: PushCommand) -> str:
    """Upload the policy of a run in one commit; returns a line for the user.

    The repository is made if there is none. Raises ValueError without a policy or a token; RunError when the hub
    refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files, api = policy_files(command.run_dir), HfApi()
    check_push("REPOSITORY", command.repository)
    _asked(
        "create the repository",
        lambda: api.create_repo(command.repository, private=not command.public, repo_type="model", exist_ok=True),
    )
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    done = _asked(
        "upload",
        lambda: api.create_commit(
            command.repository, operations, commit_message="Policy of a raylign run", repo_type="model"
        ),
    )
    size = sum(path.stat().st_size for path in files) / 1e6
    return (
        f"raylign push: {len(files)} files, {size:.1f} MB: {', '.join(path.name for path in files)} -> {done.repo_url}"
    )


def _asked(phase: str, ask: Callable[[], T]) -> T:
    """What the hub answers. Its errors, and those of the network, become a RunError in one line without the token."""
    from huggingface_hub import get_token

    try:
        return ask()
    except Exception as error:  # noqa: BLE001 - of the hub's client, its uploader, and whatever reaches the network
        said = " ".join(str(error).split())[:300] or type(error).__name__
        token = get_token()
        raise RunError("Hugging Face hub", phase, said.replace(token, "***") if token else said) from None
