"""The model card: README.md beside the exported policy, as the Hugging Face hub shows it.

It says what the policy was made of, by which method, how it was evaluated, and how to repeat the run. It is written
when the policy is exported, and again when it has been evaluated. Left out: a licence, which only the author can
choose.

Nothing of the machine is in it: of a local path only the last part, of a URL no user, password or query.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.storage import Folder
from pipeline.report.wording import left_out, price, rows, verdict, yardstick

if TYPE_CHECKING:
    from pipeline.evaluation.results import Evaluation

CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says of a run.

    title: of the card. base_model: name on the hub of the model that was aligned, "" if it is not from there. tags: for
    the hub's search. data, method: sentences. recipe: TOML that repeats the run. versions: package -> version.
    """

    title: str
    base_model: str
    tags: tuple[str, ...]
    data: tuple[str, ...]
    method: tuple[str, ...]
    recipe: str
    versions: Mapping[str, str]


def write_card(facts: CardFacts, evaluation: Evaluation | None, folder: Path) -> None:
    """Write the card into the policy's folder. evaluation: None if there is none of this policy."""
    Folder(folder).write_text(CARD, card(facts, evaluation))


def card(facts: CardFacts, evaluation: Evaluation | None) -> str:
    """The text of the card."""
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    parts = [
        front_matter(facts),
        f"# {facts.title}",
        f"A causal language model, aligned by reinforcement learning with raylign {facts.versions['raylign']}.",
        _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH OR NAME OF THIS MODEL")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH OR NAME OF THIS MODEL")',
            "python",
        ),
        "## Data",
        *_list(facts.data),
        "## Method",
        *_list(facts.method),
        "## Evaluation",
        *_evaluated(evaluation),
        "## How to repeat it",
        "With this recipe, and the data and code that it names: `raylign run recipe.toml`. Every setting that it "
        "leaves out has its default.",
        _code(facts.recipe, "toml"),
        f"Versions: {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> str:
    """The YAML at the head of the card, which the hub reads. JSON strings are YAML strings, whatever is in them."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(facts.base_model)}"] if facts.base_model else []
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in facts.tags), "---"])


def public(value: Any) -> Any:
    """A setting as others may see it.

    Of a local path its last part; a URL without user, password and query; anything else unchanged.
    """
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        parts = urlsplit(value)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return Path(value).name if value.startswith(("/", "~")) else value


def _evaluated(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["This policy has not been evaluated."]
    said = " ".join(filter(None, (verdict(evaluation), price(evaluation), yardstick(evaluation))))
    table = [("", "baseline", "policy"), ("---", "---", "---"), *rows(evaluation)]
    return [
        said,
        f"{len(evaluation.replies)} held-out prompts, {evaluation.samples} replies of the policy to each; the baseline "
        "is the model that it began from. In brackets: 95 % intervals, by bootstrap over prompts.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        *filter(None, [left_out(evaluation)]),
    ]


def _list(lines: tuple[str, ...]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)]


def _code(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
