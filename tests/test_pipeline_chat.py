"""`raylign chat`: the real entry point, in a pipe, on run folders with tiny models; its tokens are the engine's."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from actors.config import RolloutConfig, SamplingConfig
from actors.engine.protocol import Request
from actors.engine.streaming import stream
from actors.engine.torch_engine import TorchEngine
from actors.models.option_tokens import add_option_tokens
from actors.models.text import TextCodec
from entry_point import raylign, raylign_warm
from pipeline.arguments.parsing import parse
from pipeline.chat.chat import Chat, Event
from pipeline.chat.loading import open_chat
from pipeline.chat.options import ChatOptions
from pipeline.chat.terminal import talk
from pipeline.config.recipe import load, recipe_path, save
from run_helpers import command, environment
from tiny_models import save_gpt2


def new_run(folder: Path, recipe: str = "walks", *, models: tuple[str, ...] = ("finetuned", "policy")) -> Path:
    """The folder of a run, with the models that are named; they differ in their weights."""
    folder.mkdir()
    config = load(recipe_path(recipe))
    longer = {  # a token a byte
        "batch": config.batch.model_copy(update={"max_prompt_tokens": 256}),
        "model": config.model.model_copy(update={"context": 512}),
    }
    save(config.model_copy(update=longer), folder / "config.toml")
    for seed, name in enumerate(models):
        save_gpt2(folder / name, seed=seed, context=512)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_run(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose replies are conversations with the world's partner."""
    return new_run(tmp_path_factory.mktemp("chat") / "world", "conversation")


def typed(run: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = command("chat", str(run), *options)
    return subprocess.run(arguments, input=lines, env=environment(), capture_output=True, text=True, timeout=300)


def test_both_models_answer_in_a_pipe_with_their_rewards(run: Path) -> None:
    said = typed(run, "c\n/prompt\n/again\n/nonsense\n/quit\n", "--max-tokens", "5", "--seed", "3")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("baseline: ") == said.stdout.count("policy: ") == 3
    assert said.stdout.count("rule: ") == 6
    assert "prompt: c\n" in said.stdout
    assert "there is no command /nonsense" in said.stdout


def texts(events: list[Event], side: str) -> str:
    return "".join(event.text for event in events if event.kind == "piece" and event.side == side)


def opened(run: Path, **options: object) -> Chat:
    return open_chat(load(run / "config.toml"), run, ChatOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_are_those_of_the_engine(run: Path, temperature: float) -> None:
    engine = TorchEngine(str(run / "policy"), RolloutConfig(slots=8), torch.device("cpu"))
    sampling, prompt = SamplingConfig(max_new_tokens=20, temperature=temperature), np.array([99, 100], np.int32)
    [whole] = engine.generate([Request(sample_id=7, group_id=0, prompt=prompt)], sampling, seed=5)
    assert list(stream(engine, prompt, sampling, seed=5, sample_id=7)) == whole.tokens.tolist()


def test_the_sides_speak_in_turn_and_the_pieces_are_the_reply(run: Path) -> None:
    chat = opened(run, max_tokens=6, seed=1)
    events = list(chat.prompt())
    spoken = [event.side for event in events if event.kind == "piece"]
    assert set(spoken[:2]) == {"baseline", "policy"}, "neither waits for the other's whole reply"
    for side in chat.sides:
        assert texts(events, side.name) == side.replies[-1].text
        [reward] = [event for event in events if event.kind == "score" and event.side == side.name]
        assert reward.value is not None
    before = [side.replies[-1].tokens for side in chat.sides]
    list(chat.again())
    assert [len(side.replies) for side in chat.sides] == [1, 1]
    assert [side.replies[-1].tokens for side in chat.sides] != before


def test_a_character_that_is_spread_over_tokens_comes_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = opened(run)
    side = chat.sides[0]
    [tokens] = side.codec.encode_replies(["ü€🙂 a"])
    assert len(tokens) == 2 + 3 + 4 + 2
    monkeypatch.setattr("pipeline.chat.side.stream", lambda *_, **__: iter([*tokens, 0xFF]))
    side.begin([99])
    pieces = list(side.reply(SamplingConfig(), seed=0, sample_id=0))[1:]
    assert pieces[:3] == ["ü", "€", "🙂"]
    assert "".join(pieces) == TextCodec(side.codec.tokenizer).decode_replies([[*tokens, 0xFF]])[0]


def test_the_partner_answers_and_again_leads_it_back_to_where_it_was(world: Path) -> None:
    chat = opened(world, max_tokens=8, seed=2)
    events = [*chat.prompt(), *chat.go_on()]
    for side in chat.sides:
        rewards = [e for e in events if e.kind == "score" and e.side == side.name and e.text == "environment"]
        assert len(rewards) == 2 and all(reward.value is not None for reward in rewards)
        assert len([e for e in events if e.kind == "partner" and e.side == side.name]) == 2
        assert len(side.replies) == 2
    contexts = [side.replies[-1].context for side in chat.sides]
    list(chat.again())
    assert [side.replies[-1].context for side in chat.sides] == contexts
    assert [len(side.replies) for side in chat.sides] == [2, 2]


def test_a_person_may_play_the_partner(world: Path) -> None:
    chat = opened(world, max_tokens=8)
    list(chat.prompt())
    events = list(chat.say("I am so sad about my dog."))
    assert not [event for event in events if event.kind == "partner"], "the environment has left"
    for side in chat.sides:
        [text] = side.codec.decode_prompts([side.replies[-1].context])
        assert text.count("I am so sad about my dog.") == 1 and text.endswith("<|bot|>")
        assert text.count("<|user|>") == 2, "the partner's own second line was replaced"


def test_a_conversation_ends_with_its_environment_or_when_the_context_is_full(world: Path) -> None:
    chat = opened(world, max_tokens=24)
    events = list(chat.prompt())
    for _ in range(12):
        events += chat.go_on()
    notes = {event.text for event in events if event.kind == "note"}
    assert any("over" in note or "context" in note for note in notes)
    events = list(chat.prompt())
    assert texts(events, "policy"), "and another begins"


def test_a_manager_s_options_are_shown(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "conversation-options", models=("start",))
    options = load(run / "config.toml").manager.options
    add_option_tokens(str(run / "start"), run / "start-with-options", options)
    chat = opened(run, max_tokens=4)
    events = [*chat.prompt(), *chat.go_on()]
    chosen = [event.text for event in events if event.kind == "option"]
    assert len(chosen) == 2 and set(chosen) <= set(options)
    [side] = chat.sides
    control = dict(zip(side.options, side.control, strict=True))
    assert [reply.context[-1] for reply in side.replies] == [control[name] for name in chosen]


def test_without_a_policy_the_baseline_talks_alone_and_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", models=("finetuned",))
    said = raylign_warm("chat", str(run), cwd=tmp_path)
    assert said.code == 0, said.err
    assert "baseline only: " in said.out and "has no policy/ yet" in said.out
    assert "ray" not in said.imported


def with_code(model: Path) -> None:
    """A model that would run code of its own."""
    file = model / "config.json"
    settings = json.loads(file.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    file.write_text(json.dumps(settings))
    (model / "own.py").write_text("raise SystemExit('this code was run')\n")


def without(what: str) -> Callable[[Path], None]:
    return lambda run: (run / what).rename(run / "gone")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.toml"), "RUN_DIR: must be the folder of a run, got "),
        (without("finetuned"), "RUN_DIR: must have a model to talk with, finetuned/ or policy/, got "),
        (
            lambda run: with_code(run / "finetuned"),
            "model.path: must be a folder or hub name of a causal language model, got ",
        ),
        (lambda run: (run / "finetuned" / "model.safetensors").unlink(), "RUN_DIR: baseline: must be "),
    ],
    ids=["no run", "no models", "a model with code", "no weights"],
)
def test_what_cannot_be_talked_with_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", models=("finetuned",))
    spoil(run)
    said = raylign_warm("chat", str(run), cwd=tmp_path)
    assert said.code == 2 and "Traceback" not in said.err
    assert said.err.startswith(f"raylign: {message}"), said.err
    assert "this code was run" not in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature: must be from 0 (the likeliest token) to 100, got -1.0"),
        (["--temperature", "nan"], "--temperature: must be from 0 (the likeliest token) to 100, got nan"),
        (["--max-tokens", "0"], "--max-tokens: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must be 0 or more, got -1"),
        (["--web", "--port", "65536"], "--port: must be from 0 (any free one) to 65535, got 65536"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_out_of_its_range_is_refused_at_once(run: Path, options: list[str], message: str) -> None:
    said = raylign("chat", str(run), *options, cwd=run)
    assert (said.code, said.err) == (2, f"raylign: {message}\n")
    assert not {"torch", "transformers", "ray"} & said.imported


def test_a_terminal_shows_columns_side_by_side(run: Path) -> None:
    chat, out = opened(run, max_tokens=4), io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    talk(chat, io.StringIO("c\n/quit\n"), console)
    [*_, last] = [line for line in out.getvalue().splitlines() if "baseline" in line]
    assert "policy" in last, "in one line"


def test_the_command_is_parsed(run: Path) -> None:
    found = parse(["chat", str(run), "--temperature", "0", "--web"])
    assert found.chat == ChatOptions(temperature=0, web=True)
    assert sys.executable and found.run_dir == run
