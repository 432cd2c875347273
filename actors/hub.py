"""Names in a recipe: a local path, or a repository of the Hugging Face hub; and whether the hub has it.

The hub is asked once, with a short deadline. The libraries that read from it try five times for each file, a minute in
all, and their errors do not name the setting. Left out: downloads, which those libraries do.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Kind = Literal["model", "dataset"]
LIMIT_S = 10.0  # longest wait for the hub, all names together
_FILE = re.compile(
    r"\.(parquet|arrow|jsonl?|csv|tsv|txt|toml|ya?ml|safetensors|bin|pt|pth|ckpt|gguf|gz|bz2|xz|zst|zip|tar)$",
    re.IGNORECASE,
)
_LONGEST, _LONGEST_PART = 4096, 255  # bytes of a path and of a name in it; Linux takes no more


def expand(name: str) -> str:
    """A path or name with `~` expanded, which a shell does not do in `--option=~/x`.

    Raises ValueError for text that cannot be a path.
    """
    if "\0" in name:
        raise ValueError("must be a path or a name, so it cannot hold a NUL character")
    if len(os.fsencode(name)) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_PART for part in name.split("/")):
        raise ValueError(
            f"must be a path or a name, so it has at most {_LONGEST} bytes, {_LONGEST_PART} between two slashes"
        )
    return os.path.expanduser(name)


def is_path(name: str) -> bool:
    """Whether a name means a local path, possibly mistyped, and not `name` or `owner/name` of the hub.

    It is a path if it exists, begins like one, has several slashes or the ending of a file, or if its first part is a
    local folder.
    """
    if name.startswith((".", "/", "~")) or os.path.lexists(name) or name.count("/") > 1:
        return True
    folder, slash, _ = name.partition("/")
    return bool(slash) and (bool(_FILE.search(name)) or os.path.isdir(folder))


def is_cached(model: str) -> bool:
    """Whether the config of a hub model is in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return False


def problems(names: Mapping[str, Kind], limit_s: float = LIMIT_S) -> dict[str, str]:
    """Name -> reason, for each repository that the hub does not give. All are asked for at the same time.

    If the hub cannot be reached, this process and its children do not ask it again, and use the cache.
    """
    from huggingface_hub import constants

    missing = {name: kind for name, kind in names.items() if not (kind == "model" and is_cached(name))}
    if constants.HF_HUB_OFFLINE:
        return dict.fromkeys(missing, "it is not in the cache, and HF_HUB_OFFLINE is set")
    found: dict[str, str] = {}

    def ask(name: str, kind: Kind) -> None:
        found[name] = _ask(name, kind, limit_s)

    # a name server may keep one waiting for longer
    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in names.items()]
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    answers = {name: found.get(name, f"{_UNREACHABLE} within {limit_s:g} s") for name in names}
    if any(answer.startswith(_UNREACHABLE) for answer in answers.values()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # for workers of a local Ray
        constants.HF_HUB_OFFLINE = True
    return {name: answer for name, answer in answers.items() if answer and name in missing}


@contextmanager
def offline() -> Iterator[None]:
    """Inside, this process reads only local files and the cache."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


_UNREACHABLE = "it does not answer"


def _ask(name: str, kind: Kind, limit_s: float) -> str:
    """The reason why the hub does not give a repository; "" if it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=limit_s)
    except HFValidationError as error:
        return f"{str(error).partition(':')[0].rstrip('.')}"
    except RepositoryNotFoundError:
        return "it has no repository of that name, or a private one, which needs `hf auth login`"
    except HfHubHTTPError as error:
        return str(error).strip().partition("\n")[0]
    except Exception as error:  # noqa: BLE001 - of the network, by whatever library the hub's client uses at the moment
        return f"{_UNREACHABLE} ({str(error).strip().partition(chr(10))[0] or type(error).__name__})"
    return ""
