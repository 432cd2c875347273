"""Text to tokens and back: what was written is what is trained on, sampled and judged, for every kind of tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from actors.engine.stop_strings import StopStrings
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer

REPLIES = ["Sure thing", " Sure thing", "  two", "\n\nSo", "é 你好", "a <s> b", "no</s>", "<|endoftext|>", ""]
PROMPTS = ["Sure", "\n\nHuman: Hi?\n\nAssistant:", "[INST] é [/INST]", "one</s> two", "a <s> b"]


def bytes_with_a_space() -> Any:
    """As RoBERTa's: a space is put before a text, and comes back."""
    from tokenizers import pre_tokenizers

    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


TOKENIZERS = {
    "bytes": tiny_models.byte_tokenizer,
    "bytes, with a space": bytes_with_a_space,
    "always": tiny_models.piece_tokenizer,
    "first": lambda: tiny_models.piece_tokenizer(scheme="first"),
    "never": lambda: tiny_models.piece_tokenizer(scheme="never"),
    "legacy": lambda: tiny_models.piece_tokenizer(scheme="legacy"),
    "ends": lambda: tiny_models.piece_tokenizer(scheme="first", ends=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Saved and loaded again, as a run does."""

    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZERS[request.param]().save_pretrained(folder)
    return TextCodec(load_tokenizer(str(folder)))


def test_a_reply_comes_back_as_it_was_written(codec: TextCodec) -> None:
    assert codec.decode_replies(codec.encode_replies(REPLIES)) == REPLIES
    assert codec.decode_replies([np.asarray(ids, np.int32) for ids in codec.encode_replies(REPLIES)]) == REPLIES


def test_a_prompt_comes_back_as_it_was_written_and_begins_once(codec: TextCodec) -> None:
    rows = codec.encode_prompts(PROMPTS)
    assert codec.decode_prompts(rows) == PROMPTS
    assert codec.decode_prompts([*rows, rows[0]])[-1] == PROMPTS[0]
    if codec.prefix:
        assert codec.prefix == [1]
        assert [row[:2].count(1) for row in rows] == [1] * len(rows)
        assert codec.encode_prompts(["<s>Hi", "<s>"]) == [[1, *codec.encode_prompts(["<s>Hi"])[0][1:]], [1]], (
            "as chat templates write it"
        )


def test_what_is_judged_in_training_is_what_is_judged_of_a_policy(codec: TextCodec) -> None:
    """A classifier learns from text; of a policy's samples it is given what their tokens decode to."""
    prompts, replies = zip(*[(prompt, reply) for prompt in PROMPTS for reply in REPLIES], strict=True)
    trained = codec.encode_judged(prompts, replies)
    said = codec.decode_prompts(codec.encode_prompts(prompts)), codec.decode_replies(codec.encode_replies(replies))
    assert codec.encode_judged(*said) == trained
    assert all(ids[: len(codec.prefix)] == codec.prefix for ids in trained)
    eos = codec.tokenizer.eos_token_id
    ends = [
        ids
        for ids, prompt, reply in zip(trained, prompts, replies, strict=True)
        if reply in ("no</s>", "<|endoftext|>")
    ]
    assert not any(ids[-1] == eos for ids in ends), (
        "the name of a special token in a reply is its characters; as an end it would be taken for padding"
    )


def test_prompt_and_reply_are_judged_as_one_text_where_no_special_token_is_named() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    assert TextCodec(tokenizer).encode_judged(["ab"], ["cd"]) == [tokenizer.encode("abcd")]
    pieces = tiny_models.piece_tokenizer()
    assert TextCodec(pieces).encode_judged(["a"], [" Sure"]) == [pieces.encode("a Sure")], (
        "with what the tokenizer itself puts around it"
    )


def test_a_reply_has_the_tokens_that_it_has_behind_its_prompt() -> None:
    """`▁` before a reply that has no space there would be one that nobody wrote."""
    tokenizer = tiny_models.piece_tokenizer()
    names = [tokenizer.convert_ids_to_tokens(ids) for ids in TextCodec(tokenizer).encode_replies(["Su", " Su"])]
    assert names == [["S", "u"], ["▁Su"]]


def test_special_tokens_of_a_prompt_are_tokens_and_those_of_a_reply_are_not() -> None:
    tokenizer = tiny_models.piece_tokenizer(scheme="first", special=("<|user|>",))
    codec, marker = TextCodec(tokenizer), tokenizer.convert_tokens_to_ids("<|user|>")
    [prompt], [reply] = codec.encode_prompts(["<|user|>Hi"]), codec.encode_replies(["<|user|>Hi"])
    assert (prompt.count(marker), reply.count(marker)) == (1, 0)
    assert codec.decode_prompts([prompt]) == codec.decode_replies([reply]) == ["<|user|>Hi"]
    assert codec.decode_replies([[marker, *reply, 2]]) == ["<|user|>Hi"], "sampled special tokens are no text"
    across = codec.encode_judged(["a<|us"], ["er|>b"])
    assert across[0].count(marker) == 0


def test_what_is_too_long_keeps_what_a_sequence_begins_with() -> None:
    codec = TextCodec(tiny_models.piece_tokenizer())
    assert [codec.shortened([1, 7, 8, 9], room) for room in (9, 4, 3, 2, 1)] == [
        [1, 7, 8, 9],
        [1, 7, 8, 9],
        [1, 8, 9],
        [1, 9],
        [9],
    ]
    assert codec.shortened([7, 8, 9], 2) == [8, 9]
    assert TextCodec(tiny_models.byte_tokenizer()).shortened([1, 7, 8, 9], 3) == [7, 8, 9]


def test_the_name_of_an_unknown_character_is_no_reason_to_fail() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "yes": 1, "<unk>": 2}, unk_token="<unk>"))
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>"))
    assert codec.encode_replies(["yes", "é"]) == codec.encode_prompts(["yes", "é"]) == [[1], [2]]
    assert codec.decode_replies([[1], [1, 99]]) == ["yes", "yes"]


@pytest.mark.parametrize(("stop", "text"), [(" Su", " Su"), ("Su", "Su"), ("é", "你é"), ("你好", "x你好"), ("é", "éé")])
def test_a_stop_string_is_seen_where_decoders_drop_a_space_or_a_torn_row_of_bytes(stop: str, text: str) -> None:
    tokenizer = tiny_models.piece_tokenizer()
    [ids] = TextCodec(tokenizer).encode_replies([text])
    found = [
        bool(StopStrings(tokenizer, (stop,)).reached([np.asarray(ids[:length], np.int32)])[0])
        for length in range(1, len(ids) + 1)
    ]
    assert found.index(True) == next(
        length for length in range(len(ids)) if stop in TextCodec(tokenizer).decode_replies([ids[: length + 1]])[0]
    )
    assert found[-1]


def test_a_worker_hands_on_what_was_said(tmp_path: Path) -> None:
    """The space that a decoder drops at the beginning reaches the reward function, and `<s>` does not."""
    from actors.config import RewardConfig
    from actors.reward.worker import RewardWorker
    from test_actors_reward import rollouts_of_tokens

    tiny_models.piece_tokenizer().save_pretrained(tmp_path)
    worker = RewardWorker(config=RewardConfig(function="test_actors_reward:length"), tokenizer_path=str(tmp_path))
    codec = TextCodec(worker.tokenizer)
    [prompt], [reply] = codec.encode_prompts(["Q:"]), codec.encode_replies([" Sure thing"])
    assert worker.texts(rollouts_of_tokens([(prompt, [*reply, 2])])) == (["Q:"], [" Sure thing"])


@pytest.mark.parametrize("named", ["its class is named", "no class is named"])
def test_a_folder_of_this_program_is_read_as_transformers_reads_it(
    named: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Without the seconds that `AutoTokenizer` takes to be imported."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    if named == "no class is named":
        del settings["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.encode("Hé <|endoftext|>!") == theirs.encode("Hé <|endoftext|>!")
    assert (ours.get_vocab(), ours.special_tokens_map, ours.padding_side) == (
        theirs.get_vocab(),
        theirs.special_tokens_map,
        theirs.padding_side,
    )


def test_a_process_that_only_reads_text_does_without_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from actors.models import tokenizer; from actors.reward import worker; "
        "tokenizer.load_tokenizer(sys.argv[1]); print('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, timeout=120, check=True
    )
    assert said.stdout.strip() == "False"
