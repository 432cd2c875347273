"""Small talk, made friendlier: real dialogues to imitate, and the sentiment of a reply as the reward.

Dialogues: the English part of the `chatterbot-corpus` package (BSD), 21 files. Three of them are no small talk and are
left out: `coding` (answers are programs), `tech_support` (ten pairs repeated a hundred times) and `trivia` (facts that
a model this small can only guess). In `emotion` and `computers` the lines after the first are alternative replies to
it; everywhere else each line answers the one before. 812 pairs remain; those with a side of more than 120 characters
and repetitions are dropped and counted (`corpus().dropped`). Spelling is left alone, but lines are put in sentence
case, because half of the files are in lower case and one is in capitals.

Held out: the hash of a prompt's words decides, so `Will you die` and `Will you die?` are on the same side. Almost a
quarter is held out, because there are few distinct prompts: a tenth would be 45. The reply to a held-out prompt may
still occur in training as the answer to another one (`No.`).

Layout: `<|user|> Hello<|bot|> Hi<|endoftext|>`. Each marker is one token, and `<|pad|>` is not `<|endoftext|>`.

Reward: VADER (Hutto & Gilbert 2014), a human-rated lexicon: a real preference that needs no network and no labelling.
`sentiment` has three safeguards against text that only games the lexicon. What they miss (exclamation marks, friendly
words in no order) is left to the KL penalty.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from pipeline.tasks.task import Demonstration, PromptText, Split
from pipeline.tasks.text_measures import distinct_n, words

USER, BOT = "<|user|>", "<|bot|>"
MAX_CHARACTERS = 120
HELDOUT_PERCENT = 23  # of some 450 distinct prompts; fewer than 100 held-out ones would measure little
NO_TALK = ("coding", "tech_support", "trivia")
ENOUGH_WORDS = 3
ALTERNATIVES = ("emotion", "computers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tidied (prompt, reply) pairs of each split, without repetition. dropped: reason -> how many pairs."""

    pairs: dict[Split, list[tuple[str, str]]]
    dropped: dict[str, int]


class SmallTalk:
    """The task; see the module."""

    name = "smalltalk"
    reward = "pipeline.tasks.smalltalk:sentiment"

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """A byte-level BPE of the training dialogues, with a token for each speaker."""
        from pipeline.tasks.tokenizers import train_byte_bpe

        texts = [f" {line}" for pair in corpus().pairs["train"] for line in pair]
        train_byte_bpe(texts, folder, vocab_size=vocabulary, special=(USER, BOT))

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """Every pair of an utterance and its reply."""
        return [
            Demonstration(prompt=self.layout(prompt), response=f" {reply}") for prompt, reply in corpus().pairs[split]
        ]

    def prompts(self, split: Split) -> list[PromptText]:
        """The distinct utterances that have a reply."""
        lines = dict.fromkeys(prompt for prompt, _ in corpus().pairs[split])
        return [PromptText(text=self.layout(line), metadata={"prompt": line}) for line in lines]

    def layout(self, line: str) -> str:
        """`<|user|> Hello<|bot|>`; the reply follows as ` Hi<|endoftext|>`.

        Spaces stand where the tokenizer learned them: before words.
        """
        return f"{USER} {tidy(line)}{BOT}"


def sentiment(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """VADER's compound score of each reply, in [-1, 1], with three safeguards.

    A positive score is multiplied by the reply's distinct-2, the share of its word pairs that are not repeats ("love
    love love love" has 1/3). A reply of one or two words earns one or two thirds of a positive score; otherwise "Yes."
    would be the best answer to everything. A reply without a word scores -1, or silence would beat honesty.
    """
    return [_sentiment(response) for response in responses]


def _sentiment(reply: str) -> float:
    length = len(words(reply))
    if length == 0:
        return -1.0
    compound = float(_analyzer().polarity_scores(reply)["compound"])
    return compound * distinct_n([reply], 2) * min(1.0, length / ENOUGH_WORDS) if compound > 0 else compound


@cache
def _analyzer() -> Any:
    """VADER's analyser; one a process, because it reads a lexicon of 7,500 words."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError(
            "reward.function: pipeline.tasks.smalltalk:sentiment needs the package vaderSentiment; pip install "
            "vaderSentiment==3.3.2"
        ) from error
    return SentimentIntensityAnalyzer()


@cache
def corpus() -> Corpus:
    """The dialogues as pairs. A prompt's split depends on its words alone, so punctuation moves no prompt."""
    dropped: Counter[str] = Counter()
    pairs: dict[Split, list[tuple[str, str]]] = {"train": [], "heldout": []}
    seen: set[tuple[str, ...]] = set()
    for prompt, reply in _raw_pairs():
        reason = _unfit(prompt, reply)
        if not reason:
            prompt, reply = tidy(prompt), tidy(reply)
            key = (*words(prompt), "|", *words(reply))
            reason = "repeated" if key in seen else ""
            seen.add(key)
        if reason:
            dropped[reason] += 1
        else:
            pairs[_split_by_words(prompt)].append((prompt, reply))
    return Corpus(pairs=pairs, dropped=dict(dropped))


def _split_by_words(prompt: str) -> Split:
    """The split of a prompt, by the hash of its words."""
    return "heldout" if xxhash.xxh3_64_intdigest(" ".join(words(prompt)).encode()) % 100 < HELDOUT_PERCENT else "train"


def tidy(line: str) -> str:
    """One line in sentence case: single spaces, a capital at the start, `I` for a lone `i`, no line in capitals."""
    line = " ".join(line.split())
    if line.isupper() and len(line) > 4:
        line = line.lower()
    line = re.sub(r"\bi\b(?!\.e)", "I", line)
    return line[:1].upper() + line[1:]


def _unfit(prompt: object, reply: object) -> str:
    """The reason to drop a pair, or "". YAML reads unquoted numbers and yes/no as other types than text."""
    if not (isinstance(prompt, str) and isinstance(reply, str)):
        return "not text"
    if not (words(prompt) and words(reply)):
        return "empty"
    return "too long" if max(len(tidy(prompt)), len(tidy(reply))) > MAX_CHARACTERS else ""


def _raw_pairs() -> list[tuple[Any, Any]]:
    """Every utterance with a reply to it, in the order of the files."""
    import yaml

    pairs: list[tuple[Any, Any]] = []
    for path in sorted(_folder().glob("*.yml")):
        if path.stem in NO_TALK:
            continue
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            firsts = lines[:1] * (len(lines) - 1) if path.stem in ALTERNATIVES else lines[:-1]
            pairs += zip(firsts, lines[1:], strict=True)
    return pairs


def _folder() -> Path:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("task: smalltalk needs the package chatterbot-corpus; pip install chatterbot-corpus==1.3.3")
    return Path(spec.submodule_search_locations[0]) / "data" / "english"
