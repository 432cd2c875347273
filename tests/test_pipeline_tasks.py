"""Tasks: what they hand out, how prompts are drawn, and that their rewards say what they claim."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from actors.reward.worker import load_function
from pipeline.data.registry import TASKS, load_task
from pipeline.encoding.prompt_stream import PromptStream, permutation
from pipeline.encoding.tables import demonstration_ids
from pipeline.tasks import smalltalk, walks
from pipeline.tasks.smalltalk import SmallTalk, sentiment
from pipeline.tasks.task import SPLITS, Demonstration, PromptText, Task
from pipeline.tasks.text_measures import distinct_n, words
from pipeline.tasks.tokenizers import END, PAD, character_tokenizer, train_byte_bpe
from pipeline.tasks.walks import RandomWalks, optimality

not_a_task = dict
FIRST_WALKS = ["oseotba", "qka", "jrmhnba", "cua", "qkinba"]
HAND_MADE = {  # walk -> optimality; edges: b>a, c>ou, u>a, o>st, s>en, t>b, e>jor, q>kmp, k>air, i>np, n>b
    "cua": 1.0,
    "ba": 1.0,
    "cotba": (10 - 5) / (10 - 3),
    "qkinba": (10 - 6) / (10 - 3),
    "coseotba": (10 - 8) / (10 - 3),
    "coseoseotb": 0.0,  # ten nodes, and not there
    "coseoseotba": 0.0,  # there, but with eleven nodes
    "ca": 0.0,  # no such edge
    "cu": 0.0,  # stops short
    "c": 0.0,
    "cuazzz": 1.0,  # what follows the goal is not read
    "c ua": 0.0,  # a space is no node
    "cUa": 0.0,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tokenizer of every task, saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in TASKS:
        load_task(name).build_tokenizer(folder / name, 512)
    return {name: load_tokenizer(str(folder / name)) for name in TASKS}


# --- every task ---


@pytest.mark.parametrize("name", TASKS)
def test_task_is_whole(name: str, tokenizers: dict[str, Any]) -> None:
    task, tokenizer = load_task(name), tokenizers[name]
    assert isinstance(task, Task) and task.name == name
    reward = load_function(task.reward) if task.reward else None  # an environment may reward it instead
    for split in ("train", "heldout"):
        prompts, demonstrations = task.prompts(split), task.demonstrations(split)
        assert len({f"{prompt.text} {prompt.metadata}" for prompt in prompts}) == len(prompts) > 0
        assert json.loads(json.dumps(prompts[0].metadata)) == prompts[0].metadata
        if reward is not None:
            scores = reward(
                [d.prompt for d in demonstrations], [d.response for d in demonstrations], [{}] * len(demonstrations)
            )
            assert len(scores) == len(demonstrations) and np.isfinite(scores).all() and np.abs(scores).max() <= 1
        [(prompt, response)] = demonstration_ids(demonstrations[:1], TextCodec(tokenizer))
        assert tokenizer.decode(prompt) == demonstrations[0].prompt
        assert tokenizer.decode(response) == demonstrations[0].response + END
    assert task.prompts("train") == load_task(name).prompts("train")


@pytest.mark.parametrize("name", TASKS)
def test_tokenizer_keeps_end_and_padding_apart_and_loses_nothing(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for demonstration in load_task(name).demonstrations("heldout"):
        text = demonstration.prompt + demonstration.response
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", TASKS)
def test_text_has_the_tokens_that_the_tokenizer_itself_gives_it(name: str, tokenizers: dict[str, Any]) -> None:
    """A tokenizer that puts nothing before a text and loses nothing needs no help, so tables, samples and rewards of
    these tasks are what they always were.
    """
    tokenizer, codec = tokenizers[name], TextCodec(tokenizers[name])
    shown = [demonstration for split in SPLITS for demonstration in load_task(name).demonstrations(split)]
    prompts, replies = [d.prompt for d in shown], [d.response for d in shown]

    def ids(texts: list[str]) -> Any:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    assert codec.encode_prompts(prompts) == ids(prompts)
    assert codec.encode_replies(replies) == ids(replies)
    assert codec.encode_judged(prompts, replies) == ids([d.prompt + d.response for d in shown])
    assert (codec.decode_prompts(ids(prompts)), codec.decode_replies(ids(replies))) == (prompts, replies)
    rng = np.random.default_rng(0)
    sampled = [rng.integers(0, len(tokenizer) + 5, size) for size in range(1, 40)]
    plain = [[token for token in row.tolist() if token < len(tokenizer)] for row in sampled]
    assert codec.decode_replies(sampled) == tokenizer.batch_decode(
        plain, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_tasks_are_known_by_name_or_import_path() -> None:
    assert isinstance(load_task("walks"), RandomWalks)
    assert isinstance(load_task("pipeline.tasks.smalltalk:SmallTalk"), SmallTalk)
    with pytest.raises(
        ValueError,
        match=r"task: must be one of smalltalk, twenty-questions, walks, world, .*, files or an .*, got 'walk'",
    ):
        load_task("walk")
    with pytest.raises(ValueError, match=r"task: must be importable, got 'no_such_module:Task'"):
        load_task("no_such_module:Task")
    with pytest.raises(ValueError, match=r"task: must make a Task, got .* without name, reward"):
        load_task("test_pipeline_tasks:not_a_task")


def test_tasks_are_found_without_torch_or_ray() -> None:
    code = (
        "import sys; from pipeline.data.registry import *; [load_task(t) for t in TASKS]; print({'torch', 'ray', "
        "'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "set()"


# --- the order of prompts ---


def stream(prompts: list[str], tokenizer: Any, **limits: int) -> PromptStream:
    texts = [PromptText(text=text, metadata={"text": text}) for text in prompts]
    return PromptStream(
        texts, TextCodec(tokenizer), **{"seed": 0, "max_prompt_tokens": 8, "context": 32, "max_new_tokens": 8, **limits}
    )


def drawn(prompts: PromptStream, groups: range) -> list[str]:
    return [json.loads(text)["text"] for text in prompts.draw(groups).table["metadata"].to_pylist()]


def test_each_epoch_is_another_permutation_of_all_prompts(tokenizers: dict[str, Any]) -> None:
    prompts = stream(list("bcdefgh"), tokenizers["walks"])
    epochs = [drawn(prompts, range(7 * e, 7 * e + 7)) for e in range(4)]
    assert all(sorted(epoch) == list("bcdefgh") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_prompt_depends_on_seed_and_group_alone(tokenizers: dict[str, Any]) -> None:
    letters = list("bcdefgh")
    whole = drawn(stream(letters, tokenizers["walks"]), range(40))
    jumping = stream(letters, tokenizers["walks"])
    assert [drawn(jumping, range(c, c + 1))[0] for c in reversed(range(40))] == whole[::-1]
    assert drawn(stream(letters, tokenizers["walks"]), range(17, 31)) == whole[17:31]
    assert drawn(stream(letters, tokenizers["walks"], seed=1), range(40)) != whole


def test_the_permutation_never_changes() -> None:
    """A run that is resumed under another NumPy must go on with the same prompts."""
    assert permutation(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(3, 5, 8).tolist() == [6, 4, 3, 2, 0, 7, 5, 1]


def test_drawn_prompts_carry_group_id_tokens_and_metadata(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["walks"]
    table = stream(["b", "cd"], tokenizer).draw(range(5, 9)).table
    assert table["group_id"].to_pylist() == [5, 6, 7, 8]
    for tokens, metadata in zip(table["tokens"].to_pylist(), table["metadata"].to_pylist(), strict=True):
        assert tokenizer.decode(tokens) == json.loads(metadata)["text"]


@pytest.mark.parametrize(
    ("prompts", "limits", "message"),
    [
        ([], {}, "task: must have at least one prompt, got none"),
        (["b", ""], {}, "prompt 1 must have at least 1 token, got 0"),
        (["b", "bcdefghij"], {}, r"batch.max_prompt_tokens: prompt 1 must have at most 8 tokens, got 9"),
        (
            ["bcdef"],
            {"context": 12},
            r"prompt 0 must leave room for 8 new tokens in the model's context of 12, got 5 prompt tokens; set it to "
            r"at most 7",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_named(
    prompts: list[str], limits: dict[str, int], message: str, tokenizers: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(prompts, tokenizers["walks"], **limits)


# --- tokenizers ---


def test_byte_bpe_encodes_anything_and_is_the_same_for_every_order_of_texts(tmp_path: Path) -> None:
    texts = [f" {line}" for pair in smalltalk.corpus().pairs["train"] for line in pair]
    train_byte_bpe(texts, tmp_path / "one", vocab_size=400, special=("<|x|>",))
    train_byte_bpe(texts[::-1], tmp_path / "two", vocab_size=400, special=("<|x|>",))
    one, two = (load_tokenizer(str(tmp_path / name)) for name in ("one", "two"))
    assert one.get_vocab() == two.get_vocab()
    assert len(one) == 400
    assert one.convert_tokens_to_ids([END, PAD, "<|x|>"]) == [0, 1, 2]
    for text in ("naïve  日本\n🙂", " Hello", "<|x|> a"):
        assert one.decode(one.encode(text), clean_up_tokenization_spaces=False) == text
    with pytest.raises(ValueError, match="vocab_size: must be >= 259"):
        train_byte_bpe(texts, tmp_path, vocab_size=258, special=("<|x|>",))


def test_character_tokenizer_has_one_token_a_letter(tmp_path: Path) -> None:
    character_tokenizer("abc", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("cab" + END) == [4, 2, 3, 0]
    assert tokenizer.decode([4, 2, 3, 0], skip_special_tokens=True) == "cab"
    assert tokenizer.encode("bd") == [3, tokenizer.pad_token_id]


# --- small talk ---


def test_corpus_is_split_by_prompt() -> None:
    pairs = smalltalk.corpus().pairs
    train, heldout = ({tuple(words(prompt)) for prompt, _ in pairs[split]} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(SmallTalk().prompts("heldout")) >= 100
    assert len(pairs["train"]) > 500
    assert {smalltalk._split_by_words(prompt) for prompt in ("Are you sad", "are you sad?", "ARE YOU SAD!")} == {
        smalltalk._split_by_words("Are you sad")
    }


def test_every_pair_is_kept_or_counted() -> None:
    corpus = smalltalk.corpus()
    kept = sum(len(pairs) for pairs in corpus.pairs.values())
    assert kept + sum(corpus.dropped.values()) == len(smalltalk._raw_pairs()) == 812
    lines = [line for pairs in corpus.pairs.values() for pair in pairs for line in pair]
    assert all(
        line == " ".join(line.split()) and words(line) and len(line) <= smalltalk.MAX_CHARACTERS for line in lines
    )
    assert max(Counter(pair for pairs in corpus.pairs.values() for pair in pairs).values()) == 1


def test_alternative_replies_answer_the_first_line_and_dialogues_the_line_before() -> None:
    pairs = [pair for split in smalltalk.corpus().pairs.values() for pair in split]
    assert ("Are you sad", "No, I am as happy as ever.") in pairs
    assert ("Are you sad", "I don't understand.") in pairs
    assert ("I am also good.", "That's good.") in pairs


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ("  hello \n there", "Hello there"),
        ("i think i'm fine", "I think I'm fine"),
        ("WHAT IS CRICKET", "What is cricket"),
        ("AI?", "AI?"),
        ("by NASA", "By NASA"),
        ("", ""),
    ],
)
def test_tidy(raw: str, tidy: str) -> None:
    assert smalltalk.tidy(raw) == tidy
    assert smalltalk.tidy(tidy) == tidy


def test_what_is_unfit_is_said() -> None:
    assert smalltalk._unfit("a", 1963) == "not text"
    assert smalltalk._unfit("...", "a") == "empty"
    assert smalltalk._unfit("a", "b" * 121) == "too long"
    assert smalltalk._unfit("a", "b") == ""


def test_a_typed_line_is_laid_out_as_in_training() -> None:
    assert SmallTalk().layout("hello ") == "<|user|> Hello<|bot|>"
    demonstrations = SmallTalk().demonstrations("train") + SmallTalk().demonstrations("heldout")
    assert Demonstration(prompt="<|user|> Hello<|bot|>", response=" Hi") in demonstrations


def test_missing_corpus_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install chatterbot-corpus"):
        smalltalk._folder()


def test_missing_lexicon_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ValueError, match="pip install vaderSentiment"):
        smalltalk._analyzer.__wrapped__()


def judged(reply: str) -> float:
    return sentiment([""], [reply], [{}])[0]


def test_sentiment_is_vader_for_ordinary_replies() -> None:
    assert judged("VADER is smart, handsome, and funny.") == 0.8316  # the example its authors publish
    assert judged("VADER is not smart, handsome, nor funny.") == -0.7424
    assert judged("The book is on the table.") == 0.0


def test_sentiment_cannot_be_won_by_repetition_or_silence() -> None:
    once = judged("I love you")
    assert 0 < judged("love love love love") < once
    assert judged("I love you. I love you. I love you.") < once
    assert judged("") == judged(" ...") == -1.0
    assert judged("hate hate hate hate") < -0.5, "repetition must not soften a bad reply"


@pytest.mark.parametrize(
    ("reply", "share"),
    [("Yes.", 1 / 3), ("Love!", 1 / 3), ("Very good.", 2 / 3), ("I love you.", 1), ("I really love you.", 1)],
)
def test_a_reply_of_one_or_two_words_earns_its_share_of_three(reply: str, share: float) -> None:
    compound = smalltalk._analyzer().polarity_scores(reply)["compound"]
    assert compound > 0
    assert judged(reply) == pytest.approx(share * compound)


def test_brevity_does_not_soften_a_bad_reply() -> None:
    assert judged("Hate.") == smalltalk._analyzer().polarity_scores("Hate.")["compound"] < 0


# --- text measures ---


def test_distinct_n() -> None:
    assert words("I'm fine, it's 9 o'clock!") == ["i'm", "fine", "it's", "9", "o'clock"]
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b", "a b"], 2) == 0.5
    assert distinct_n(["a", ""], 2) == 1.0
    with pytest.raises(ValueError, match="n: must be >= 1"):
        distinct_n(["a"], 0)


# --- random walks ---


def test_the_graph_is_the_field_s() -> None:
    edges = walks.adjacency()
    assert edges.sum(axis=1).tolist() == [1, 1, 2, 4, 3, 1, 2, 1, 2, 4, 3, 3, 1, 1, 2, 3, 3, 2, 2, 1, 1]
    assert np.flatnonzero(edges[0]).tolist() == [0]
    assert not np.diag(edges)[1:].any()
    assert walks.walks()["train"][:5] == FIRST_WALKS


def test_shortest_lengths_agree_with_matrix_powers() -> None:
    """Nodes on a shortest way = 1 + the least power of the adjacency matrix with an entry at the goal."""
    edges = walks.adjacency().astype(np.int64)
    for start, shortest in enumerate(walks.shortest_lengths()):
        reached = [np.linalg.matrix_power(edges, power)[start, 0] > 0 for power in range(10)]
        assert shortest == 1 + reached.index(True)
    assert walks.shortest_lengths() == (1, 2, 3, 3, 5, 5, 3, 4, 4, 4, 2, 3, 5, 3, 4, 4, 3, 5, 4, 3, 2)


def test_walks_are_valid_and_end_at_the_goal_or_at_ten_nodes() -> None:
    edges, drawn_walks = walks.adjacency(), walks.walks()
    assert {split: len(w) for split, w in drawn_walks.items()} == {"train": 1000, "heldout": 200}
    for walk in drawn_walks["train"] + drawn_walks["heldout"]:
        nodes = [ord(letter) - ord("a") for letter in walk]
        assert nodes[0] != 0 and all(edges[u, v] for u, v in pairwise(nodes))
        assert (nodes[-1] == 0 or len(nodes) == 10) and 0 not in nodes[:-1] and len(nodes) <= 10


def test_every_shortest_way_is_worth_one() -> None:
    edges, shortest = walks.adjacency(), walks.shortest_lengths()
    for start in range(1, walks.NODES):
        way = [start]
        while way[-1] != 0:
            way.append(
                next(v for v in range(walks.NODES) if edges[way[-1], v] and shortest[v] == shortest[way[-1]] - 1)
            )
        text = "".join(walks.LETTERS[node] for node in way)
        assert optimality([text[0]], [text[1:]], [{}]) == [1.0]


def test_optimality_of_walks_made_by_hand() -> None:
    walk, scores = list(HAND_MADE), list(HAND_MADE.values())
    assert optimality([w[0] for w in walk], [w[1:] for w in walk], [{}] * len(walk)) == pytest.approx(scores)
    assert optimality([""], ["zzz"], [{}]) == [0.0]


def test_random_walks_score_in_the_middle() -> None:
    """What a model that imitates perfectly would reach, and reinforcement learning has to beat."""
    scores = optimality(
        [walk[0] for walk in walks.walks()["train"]], [walk[1:] for walk in walks.walks()["train"]], [{}] * 1000
    )
    assert np.mean(scores) == pytest.approx(0.790, abs=0.001)
