"""A language model as partner: what it reads, what it says, and that nothing but its conversation decides that."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import tiny_models
from actors.config import EnvironmentConfig, RewardConfig, RolloutConfig, SamplingConfig
from actors.engine.protocol import Completion
from actors.experience import Prompts, Rollouts
from actors.models.causal_lm import load_causal_lm
from actors.models.text import TextCodec
from actors.reward.worker import RewardWorker
from actors.rollout.partner_model import Line, PartnerModel
from actors.rollout.worker import RolloutWorker
from actors.weights import parameters_checksum
from cluster.session import Session
from conversation_helpers import recipe
from pipeline.config.recipe import load
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig
from pipeline.data.config import TemplateConfig
from pipeline.data.template import Layout
from pipeline.data.turns import Turn as Said
from pipeline.environments.environment import Environment, Turn
from pipeline.environments.model_partner import ModelPartner, PartnerSpec, _number
from pipeline.environments.partner_view import INSTRUCTION, Marks, PartnerView
from pipeline.environments.registry import load_environment
from pipeline.environments.served import EnvironmentSource
from pipeline.evaluation.examiner import LoadedWeights
from pipeline.plan.preflight import preflight, with_full_paths
from pipeline.run.start import resume, run_stages
from pipeline.tasks.smalltalk import SmallTalk
from pipeline.tasks.task import PromptText
from run_helpers import assert_same, metrics_of, quiet
from talk_helpers import Chatter

SAMPLING = SamplingConfig(max_new_tokens=8, stop=("\n",))
MARKS = Marks(first="[", before="[", after="]")
TEXTS = ("[Hello]", "[Who is there?]", "[Ah]", "[So]", "[No]", "[Tell me more]")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_gpt2(tmp_path_factory.mktemp("partner"), seed=5)


def partner(folder: Path, **changes: Any) -> ModelPartner:
    spec = PartnerSpec(path=str(folder), marks=MARKS, sampling=SAMPLING, rollout=RolloutConfig(slots=8))
    return ModelPartner(replace(spec, **changes))


def prompt(text: str, **metadata: Any) -> PromptText:
    return PromptText(text=text, metadata=metadata)


def replies(number: int) -> list[str]:
    random = Random(number)
    return ["".join(random.choices("abc xyz", k=random.randint(1, 6))) for _ in range(3)]


def conversation(environment: Environment, number: int, seed: int = 3) -> list[Turn]:
    """Had alone, up to its end or three turns."""
    episodes, turns = environment.reset([prompt(TEXTS[number])], [seed])
    found = list(turns)
    for reply in replies(number):
        if found[-1].over:
            break
        found += environment.step(episodes, [reply])
    environment.close(episodes)
    return found


# ---- what it reads ----


def view(marks: Marks, template: str | None = None) -> PartnerView:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = template
    return PartnerView(marks=marks, tokenizer=tokenizer, clean=TextCodec(tokenizer).without_special)


def test_without_a_template_it_reads_the_policys_own_text_up_to_its_turn() -> None:
    marks = Marks.of(SmallTalk())
    assert marks == Marks(first="<|user|> ", before="<|user|> ", after="<|bot|>")
    said = view(marks).text(prompt("<|user|> Hello<|bot|>"), [" Who is it?", "Me", " Oh"])
    assert said == "<|user|> Hello<|bot|> Who is it?<|user|> Me<|bot|> Oh<|user|>"
    assert marks.stops == ("<|bot|>", "<|user|>")


def test_with_a_template_the_roles_are_swapped_after_an_instruction() -> None:
    roles = Layout(kind="roles", template=TemplateConfig(end="~"))
    turns = (Said("system", "Be kind."), Said("user", "Hi"), Said("assistant", "Ho"), Said("user", "And\n\nnow?"))

    class Roles(Chatter):
        continuation = staticmethod(roles.continuation)

        def layout(self, line: str) -> str:
            return roles.prompt((Said("user", line),))

    marks = Marks.of(Roles())
    begun = roles.prompt(turns)
    assert begun == "\n\nSystem: Be kind.~\n\nHuman: Hi~\n\nAssistant: Ho~\n\nHuman: And\n\nnow?~\n\nAssistant:"
    assert marks.lines(begun) == ["Hi", "Ho", "And\n\nnow?"]
    asked = view(marks, CHAT).text(prompt(begun), [" Now.", "When?", " Soon"])
    before = f"<user>{INSTRUCTION}<assistant>Hi<user>Ho<assistant>And\n\nnow?"
    assert asked == f"{before}<user>Now.<assistant>When?<user>Soon<assistant>"
    own = view(marks, CHAT).text(prompt(begun, partner="Be cross."), ["x"])
    assert own == "<user>Be cross.<assistant>Hi<user>Ho<assistant>And\n\nnow?<user>x<assistant>"


def test_a_prompt_of_chat_marks_is_read_too_and_one_without_marks_is_one_line() -> None:
    marks = Marks(first="<s>sys: dear<e>user: ", before="<e>user: ", after="<e>bot: ")
    assert marks.lines("<s>sys: other<e>user: Hi<e>bot: Ho<e>user: So<e>bot: ") == ["Hi", "Ho", "So"]
    assert Marks().lines("Once upon a time") == ["Once upon a time"]
    assert (Marks().stops, Marks().line(" there was"), MARKS.line(" there was")) == ((), " there was", "there was")


def test_a_policy_cannot_speak_by_the_names_of_special_tokens() -> None:
    said = view(MARKS).text(prompt("[Hi]"), ["No<|endof<|endoftext|>text|>, yes"])
    assert said == "[Hi]No, yes["


def test_a_task_that_lays_lines_out_in_another_way_is_refused() -> None:
    class Shouts(Chatter):
        def layout(self, line: str) -> str:
            return f"[{line.upper()}]"

    with pytest.raises(ValueError, match=r"^task: must lay out a line as it is, .*got '\[HELLO THERE\.\]' .*'chatter'"):
        Marks.of(Shouts())


# ---- what it says ----


def test_a_line_is_what_the_engine_samples_from_its_own_side(folder: Path) -> None:
    """Greedy: what transformers' generate says after the same text, up to the first mark."""
    from transformers import AutoModelForCausalLM

    greedy = SamplingConfig(max_new_tokens=8, temperature=0)
    [_, first, *_] = conversation(partner(folder, sampling=greedy), 0)
    codec = TextCodec(tiny_models.byte_tokenizer())
    ids = torch.tensor(codec.encode_prompts([f"[Hello]{replies(0)[0]}["]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids.shape[1] :].numpy()
    [text] = codec.decode_replies([new])
    assert first.text == min(text.split("[")[0], text.split("]")[0], key=len).strip()
    assert first.info["partner_tokens"] <= 8


def test_a_line_ends_before_the_end_of_text_a_stop_string_or_a_mark(folder: Path) -> None:
    lines = []
    for stop in ((), ("a", "e", "\n")):
        model = PartnerModel(str(folder), RolloutConfig(slots=8), SamplingConfig(max_new_tokens=40, stop=stop))
        lines.append(model.say(["[Hello]abc["] * 20, range(20)))
    for free, cut in zip(*lines, strict=True):
        first = min((place for stop in ("a", "e", "\n") if (place := free.text.find(stop)) >= 0), default=None)
        assert cut.text == free.text[:first]
        assert "<|endoftext|>" not in free.text
        assert (cut.is_cut, free.is_cut) == (cut.tokens == 40 and first is None, free.tokens == 40)
    assert any(line.tokens < 40 for line in lines[0]), "one ended by itself"
    assert any(line.is_cut for line in lines[0])


def test_a_line_ends_at_a_mark_that_is_a_special_token_and_keeps_no_other(tmp_path: Path) -> None:
    tokenizer = tiny_models.piece_tokenizer(scheme="first", special=("<|user|>", "<|bot|>"))
    folder = tiny_models.save_llama(tmp_path, tokenizer=tokenizer)
    model = PartnerModel(str(folder), RolloutConfig(slots=8), SamplingConfig(stop=("<|bot|>",)))
    for said, text in (("Su<|bot|>t", "Su"), ("S<s>u</s>", "Su"), ("Su", "Su"), ("</s>", "")):
        tokens = np.array(tokenizer(said, add_special_tokens=False)["input_ids"], np.int32)
        acted = np.ones(len(tokens), np.bool_)
        completion = Completion(
            sample_id=0,
            tokens=tokens,
            sampled=acted,
            logprobs=np.zeros(len(tokens), np.float32),
            turn_starts=(0,),
            finish="stop",
        )
        assert model._line(completion).text.strip() == text


def test_its_weights_are_named_by_their_checksum(folder: Path) -> None:
    [_, turn, *_] = conversation(partner(folder), 0)
    assert turn.info["partner"] == parameters_checksum(load_causal_lm(str(folder), torch.float32))


def test_a_partner_with_a_chat_template_says_what_follows_the_chat(folder: Path, tmp_path: Path) -> None:
    chatty, strict = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("chatty", "strict"))
    tokenizer = tiny_models.byte_tokenizer()
    for path, template in ((chatty, "{% for m in messages %}{{ m.content }}|{% endfor %}"), (strict, "{{ 1 / 0 }}")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
    environment = partner(chatty)
    [talk], _ = environment.reset([prompt("[Hi]", partner="Be brief.")], [7])
    [turn] = environment.step([talk], [" Ho"])
    stop = (*SAMPLING.stop, *MARKS.stops)
    model = PartnerModel(str(folder), RolloutConfig(slots=8), SAMPLING.model_copy(update={"stop": stop}))
    [line] = model.say(["Be brief.|Hi|Ho|"], [_number(replace(talk, lines=[" Ho"]))])
    assert turn.text == line.text.strip()
    checked = load_environment("model-partner", PartnerSpec(path=str(strict), marks=MARKS))
    _, [refused] = checked.reset([prompt("[Hi]")], [7])
    assert refused.failure.startswith("error: ZeroDivisionError")


# ---- exactness ----


def test_the_same_alone_and_among_others_in_any_order_and_in_another_number_of_slots(folder: Path) -> None:
    alone = {number: conversation(partner(folder), number) for number in range(len(TEXTS))}
    assert len({turns[1].text for turns in alone.values()}) == len(TEXTS)
    for slots, order in ((8, [3, 1, 5, 0, 2, 4]), (16, [5, 4, 3, 2, 1, 0])):
        environment = partner(folder, rollout=RolloutConfig(slots=slots))
        conversation(environment, 2)  # an earlier call leaves nothing behind
        episodes, turns = environment.reset([prompt(TEXTS[n]) for n in order], [3] * len(order))
        found = {number: [turn] for number, turn in zip(order, turns, strict=True)}
        talks = dict(zip(order, episodes, strict=True))
        for turn in range(3):
            going = [number for number in order if not found[number][-1].over]
            said = environment.step([talks[n] for n in going], [replies(n)[turn] for n in going])
            for number, one in zip(going, said, strict=True):
                found[number].append(one)
        assert found == alone


def test_the_same_from_several_threads_at_once_with_weights_loaded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engine import torch_engine

    made: list[str] = []

    class Counted(torch_engine.TorchEngine):
        def __init__(self, path: str, *arguments: Any, **settings: Any) -> None:
            made.append(path)
            super().__init__(path, *arguments, **settings)

    alone = {number: conversation(partner(folder), number) for number in range(len(TEXTS))}
    monkeypatch.setattr(torch_engine, "TorchEngine", Counted)
    environment, found = partner(folder), dict[int, list[Turn]]()
    environment.load()
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: conversation(environment, number)}))  # type: ignore[misc]
        for number in range(len(TEXTS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert made == [str(folder)]


def test_a_line_changes_with_the_seed_of_its_conversation_and_with_the_turn(folder: Path) -> None:
    first, again, other = (conversation(partner(folder), 0, seed) for seed in (3, 3, 4))
    assert first == again
    assert first[1] != other[1]
    environment = partner(folder, marks=Marks())
    [talk], _ = environment.reset([prompt("x")], [3])
    texts: list[Any] = []
    environment._model.say = lambda _, numbers: texts.extend(numbers) or [Line(text="y")]  # type: ignore[method-assign, func-returns-value]
    for _ in range(3):
        environment.step([talk], ["z"])
    assert len(set(texts)) == 3


# ---- what goes wrong ----


def test_a_partner_with_nothing_to_say_has_left(folder: Path) -> None:
    stops = tuple(map(chr, range(33, 80)))  # some lines end before they begin
    environment = partner(folder, sampling=SamplingConfig(max_new_tokens=8, stop=stops))
    episodes, _ = environment.reset([prompt("[Hi]")] * 20, range(20))
    turns = environment.step(episodes, ["Ho"] * 20)
    left = [turn for turn in turns if not turn.text]
    assert 0 < len(left) < 20
    for turn in left:
        assert (turn.terminated, turn.truncated, turn.failure) == (True, False, "")
        assert (turn.info["partner_left"], turn.info["note"]) == (True, "the partner has left")
    assert not any(turn.over or turn.info["partner_left"] for turn in turns if turn.text)


def test_a_full_context_breaks_the_conversation_off_or_refuses_its_prompt(folder: Path) -> None:
    environment = partner(folder)
    texts = ("[Hi]", "[Hi]", f"[{'x' * 92}]", f"[{'x' * 93}]")
    episodes, turns = environment.reset([prompt(text) for text in texts], [3] * 4)
    full = "error: the prompt fills the partner's context of 96 tokens"
    assert [turn.failure for turn in turns] == ["", "", "", full]
    short, long, last = environment.step(episodes[:3], ["Ho", "x" * 91, ""])
    assert not short.truncated and short.text
    assert (long.text, long.truncated, long.info["note"]) == ("", True, "the partner's context is full")
    assert not long.failure
    assert last.info["partner_tokens"] == 1, "there was room for one token"


def test_a_failure_is_of_the_conversation_that_it_befell(folder: Path, tmp_path: Path) -> None:
    """A word whose embedding is no number spoils only the conversations in which it is said."""
    model = load_causal_lm(str(folder), torch.float32)
    shutil.copytree(folder, tmp_path / "ill")
    [bad] = tiny_models.byte_tokenizer()("Z")["input_ids"]
    model.get_input_embeddings().weight.data[bad] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(load_causal_lm(str(folder), torch.float32).lm_head.weight.data.clone())
    model.save_pretrained(tmp_path / "ill")
    environment = partner(tmp_path / "ill")
    episodes, _ = environment.reset([prompt(text) for text in TEXTS[:3]], [3] * 3)
    turns = environment.step(episodes, ["a", "Z", "b"])
    assert turns[1].failure.startswith("error: the partner failed: FloatingPointError")
    assert not any(turns[1].info)
    healthy = partner(folder)
    episodes, _ = healthy.reset([prompt(text) for text in TEXTS[:3]], [3] * 3)
    expected = healthy.step(episodes, ["a", "y", "b"])
    assert [turns[0].text, turns[2].text] == [expected[0].text, expected[2].text]


# ---- in a rollout worker ----


class Long(ModelPartner):
    """A reward for each turn: how many letters the partner said."""

    def reward(self, prompt: PromptText, lines: Sequence[str]) -> float:
        assert len(lines) % 2 == 0 and prompt.text in TEXTS
        return float(len(lines[-1]))


def worker(policy: Path, folder: Path, *, slots: int = 8, name: str = "model-partner") -> RolloutWorker:
    config = RolloutConfig(slots=slots)
    talk = EnvironmentConfig(name=name, partner=str(folder), max_turns=3)
    return RolloutWorker(
        path=str(policy),
        config=config,
        sampling=SAMPLING,
        seed=11,
        talk=talk,
        environment=EnvironmentSource.of(talk, Chatter(), config, SAMPLING),
    )


def prompts(rows: Sequence[int] = range(len(TEXTS))) -> pa.Table:
    codec = TextCodec(tiny_models.byte_tokenizer())
    ids = codec.encode_prompts([TEXTS[row] for row in rows])
    return Prompts.of({"group_id": list(rows), "tokens": ids, "metadata": ["{}"] * len(rows)}).table


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_gpt2(tmp_path_factory.mktemp("policy"), context=192)


def test_its_tokens_are_masked_and_stand_whole_between_the_replies(policy: Path, folder: Path) -> None:
    table = worker(policy, folder, name=f"{__name__}:Long").generate(prompts(), 2, 0, 0, LoadedWeights())[1]  # type: ignore[arg-type]
    codec, seen = TextCodec(tiny_models.byte_tokenizer()), 0
    for row in Rollouts(table).table.to_pylist():
        record, acted, tokens = json.loads(row["metadata"])["conversation"], np.array(row["action_mask"]), row["tokens"]
        assert record["end"] in ("max_turns", "terminated", "truncated", "no_room")
        for number, turn in enumerate(record["turns"][:-1]):
            line = codec.encode_continuations([f"[{turn['line']}]"])[0]
            after = row["turn_starts"][number + 1]
            assert tokens[after - len(line) : after] == line
            assert not acted[after - len(line) : after].any() and acted[after]
            assert np.array_equal(np.array(row["logprobs"])[~acted], np.zeros((~acted).sum(), np.float32))
            seen += 1
    assert seen > 5
    scores = RewardWorker(config=RewardConfig(), tokenizer_path=str(policy), conversations=True).score(table, 0, 0)[1]
    for row, score in zip(table.to_pylist(), scores.to_pylist(), strict=True):
        turns = json.loads(row["metadata"])["conversation"]["turns"]
        assert score["turn_rewards"] == [len(turn["line"]) for turn in turns]


def test_chunks_workers_and_slots_change_no_bit(policy: Path, folder: Path) -> None:
    whole = worker(policy, folder).generate(prompts(), 2, 0, 0, LoadedWeights())[1]  # type: ignore[arg-type]
    for slots, cuts in ((16, [[0, 1, 2], [3, 4, 5]]), (8, [[5, 4], [3], [2], [1, 0]])):
        other = worker(policy, folder, slots=slots)
        parts = [other.generate(prompts(rows), 2, 0, 0, LoadedWeights())[1] for rows in cuts]  # type: ignore[arg-type]
        joined = pa.concat_tables(parts).sort_by("sample_id").combine_chunks()
        assert joined.equals(whole.sort_by("sample_id").combine_chunks())


# ---- in a recipe ----


def talking(policy: Path, folder: Path | str, name: str = "model-partner", **changes: Any) -> RunConfig:
    talk = EnvironmentConfig(name=name, partner=str(folder), max_turns=3)
    reward = RewardConfig(function=f"{__name__}:letters", max_failed=0.5)
    return recipe(policy, reward=reward, **changes).model_copy(update={"environment": talk})


def letters(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """The share of letters in the last reply."""
    return [sum(map(str.isalpha, response)) / max(len(response), 1) for response in responses]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"partner": ""},
            r"environment\.partner: must be given with environment\.name = 'model-partner', got none; give",
        ),
        (
            {"name": "world"},
            r"environment\.partner: must be left out with environment\.name = 'world', got '/x'; it is the partner of",
        ),
        ({"name": ""}, r"environment\.name: must be given with other settings of environment, got none"),
    ],
)
def test_a_partner_that_does_not_go_with_the_environment_is_refused(changes: dict[str, str], fault: str) -> None:
    config = talking(Path("/policy"), "/x")
    with pytest.raises(ValueError, match=f"^{fault}"):
        check(config.model_copy(update={"environment": config.environment.model_copy(update=changes)}))


def test_without_a_judge_there_is_nothing_to_learn_unless_it_is_a_class_of_ones_own() -> None:
    config = talking(Path("/policy"), "/x").model_copy(update={"reward": RewardConfig()})
    with pytest.raises(ValueError, match=r"^reward: must have a function or a model with environment\.name = 'model-p"):
        check(config)
    talk = config.environment.model_copy(update={"name": f"{__name__}:Long"})
    check(config.model_copy(update={"environment": talk}))


def test_a_partner_is_checked_before_anything_starts(policy: Path, folder: Path, tmp_path: Path) -> None:
    for broken, fault in (
        (tmp_path / "gone", "environment.partner: must be a folder or hub name of a causal language model, got "),
        (Path(shutil.copytree(folder, tmp_path / "mute")), "environment.partner: must have its tokenizer beside it, "),
    ):
        for file in tmp_path.glob("mute/tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match=f"^{fault}"):
            preflight(talking(policy, broken))
    narrow = tiny_models.save_gpt2(tmp_path / "narrow", context=6)
    with pytest.raises(ValueError, match=r"'model-partner': error: the prompt fills the partner's context of 6 tokens"):
        preflight(talking(policy, narrow))
    with pytest.raises(
        ValueError, match=r"^environment: must be a class or function of one argument, since environment"
    ):
        preflight(talking(policy, folder, name="talk_helpers:Mirror"))
    assert preflight(talking(policy, folder)).prompts is not None


def test_its_path_is_one_of_the_recipes_folder_and_written_in_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partner").symlink_to(folder)
    (tmp_path / "mine.toml").write_text(
        'task = "walks"\nsteps = 1\nmodel.path = "partner"\n'
        '[environment]\nname = "model-partner"\npartner = "partner"\n[reward]\nfunction = "mine:f"\n'
    )
    assert load(tmp_path / "mine.toml").environment.partner == str(tmp_path / "partner")
    monkeypatch.chdir(tmp_path)
    assert with_full_paths(talking(folder, "partner")).environment.partner == str(tmp_path / "partner")


def test_an_environment_of_ones_own_is_made_with_the_partner(folder: Path) -> None:
    made = load_environment(f"{__name__}:Long", PartnerSpec(path=str(folder), marks=MARKS))
    _, [turn] = made.reset([prompt("[Hi]")], [0])
    assert turn == Turn()
    with pytest.raises(ValueError, match=r"^environment\.partner: must be a folder or hub name with a tokenizer"):
        load_environment("model-partner", PartnerSpec(path="/nowhere")).load()


# ---- whole runs ----


@pytest.mark.slow
def test_another_number_of_workers_gives_the_same_bits_and_another_partner_is_refused_at_resume(
    ray_session: Session, tmp_path: Path, policy: Path, folder: Path
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    one, two = (
        talking(policy, own, steps=2, rollout=RolloutConfig(chunk_size=8, slots=8, workers=workers))
        for workers in (1, 2)
    )
    run_stages(one, tmp_path / "one", quiet())
    run_stages(two, tmp_path / "two", quiet())
    assert_same(tmp_path / "two", tmp_path / "one")
    last = metrics_of(tmp_path / "one")[-1]
    assert last["conversation/turns"] > 1 and last["conversation/info/partner_tokens"] > 1
    recorded = json.loads((tmp_path / "one" / "history.json").read_text())[-1]["data"]
    assert {name for name in recorded if name.startswith("partner model ")} == {
        f"partner model {part}" for part in ("weights", "configuration", "tokenizer", "ends")
    }
    moved = one.model_copy(update={"environment": one.environment.model_copy(update={"partner": str(folder)})})
    assert resume(moved, tmp_path / "one", (), quiet()) is None, "the same contents at another path"
    tiny_models.save_gpt2(own, seed=6)
    with pytest.raises(ValueError, match=r"partner model weights: .*changes the course of the run from here on"):
        resume(one.model_copy(update={"steps": 3}), tmp_path / "one", (), quiet())
