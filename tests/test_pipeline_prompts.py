"""What of a model's folder decides weights and tokens, so that a run that has begun notices another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.encoding.prompts import model_checksums
from tiny_models import save_gpt2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("models") / "model", width=16)


def merged(name: str, **values: object) -> Callable[[Path], None]:
    """An edit of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return edit


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (merged("generation_config.json", temperature=0.6, do_sample=True), set()),
        (merged("generation_config.json", eos_token_id=[256]), set()),
        (lambda folder: (folder / "generation_config.json").unlink(), set()),
        (merged("config.json", transformers_version="9", _name_or_path="elsewhere"), set()),
        (merged("trainer_state.json", step=7), set()),
        (lambda folder: (folder / "README.md").write_text("mine"), set()),
        (merged("generation_config.json", eos_token_id=[256, 255]), {"ends"}),
        (merged("config.json", n_head=4), {"configuration"}),
        (merged("tokenizer_config.json", padding_side="left"), {"tokenizer"}),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), {"tokenizer"}),
        (flipped, {"weights"}),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"more"), {"weights"}),
    ],
)
def test_only_what_decides_weights_and_tokens_counts(
    edit: Callable[[Path], None], parts: set[str], model: Path, tmp_path: Path
) -> None:
    save_gpt2(tmp_path / "model", width=16)
    before = model_checksums(str(tmp_path / "model"))
    assert before == model_checksums(str(model)), "it is in no name or date"
    edit(tmp_path / "model")
    after = model_checksums(str(tmp_path / "model"))
    assert {part for part in before if after[part] != before[part]} == parts


def test_nothing_is_known_of_a_model_that_is_not_here() -> None:
    assert model_checksums("") == model_checksums("owner/name") == {}
