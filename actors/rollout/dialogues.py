"""The conversations of a chunk: each is begun, had with the engine, and had again if its environment failed.

Requests, metadata --Conversations, Engine--> Dialogues: completions, and what the environment said
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.config import EnvironmentConfig, ManagerConfig, SamplingConfig
from actors.engine.protocol import Completion, Engine, Request
from actors.experience import CONVERSATION
from actors.manager.option_head import OptionHead
from actors.models.option_tokens import option_ids
from actors.models.text import TextCodec
from actors.reward.worker import load_function, user_code
from actors.rollout.conversations import Conversations, Environment, Opening
from actors.rollout.manager_chooser import ManagerChooser
from cluster.faults import ContractError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A conversation that is over. metadata: of its prompt, and what the environment said, as JSON."""

    request: Request
    completion: Completion
    has_failed: bool
    metadata: str
    offered: npt.NDArray[np.bool_]  # (turns, K), the options on offer; (turns, 0) without a manager

    @property
    def finish(self) -> str:
        """How its row ends: as its last turn did, or `error`."""
        return "error" if self.has_failed else self.completion.finish


class DialogueRunner:
    """Has conversations with one environment."""

    def __init__(
        self,
        environment: Environment,
        config: EnvironmentConfig,
        engine: Engine,
        manager: ManagerConfig | None = None,
    ) -> None:
        """manager: its options, whose control tokens the model knows, and their check.

        Raises ValueError for a check that cannot be imported.
        """
        self._environment, self._config, self._engine = environment, config, engine
        self._options = manager.options if manager else ()
        self._check = load_function(manager.check, field="manager.check") if manager and manager.check else None
        self._codec = TextCodec(engine.tokenizer)

    def run(
        self,
        requests: Sequence[Request],
        metadata: Sequence[str],
        sampling: SamplingConfig,
        seed: int,
        head: OptionHead | None = None,
    ) -> list[Dialogue]:
        """Have a conversation for each request, in order.

        One that fails is had again from its beginning, to the same tokens as far as it came, `attempts` times at most
        and in calls of its own: so what fails for good does not depend on its neighbours.
        head: of the manager that chooses options. Raises ContractError for an environment that breaks its contract.
        """
        known = {request.sample_id: _entries(text) for request, text in zip(requests, metadata, strict=True)}
        done: dict[int, Dialogue] = {}
        left, first = list(requests), dict[int, npt.NDArray[np.int32]]()
        for again in range(1 + self._config.attempts):
            tried = self._attempt(left, known, sampling, seed, head, first, alone=again > 0)
            done |= {one.request.sample_id: one for one in tried}
            left = [request for request in left if done[request.sample_id].has_failed]
            if not left:
                break
        return [done[request.sample_id] for request in requests]

    def _attempt(
        self,
        requests: Sequence[Request],
        known: Mapping[int, dict[str, Any]],
        sampling: SamplingConfig,
        seed: int,
        head: OptionHead | None,
        first: dict[int, npt.NDArray[np.int32]],
        *,
        alone: bool,
    ) -> list[Dialogue]:
        """first: the opening line of each group, as far as it is known."""
        talk = Conversations(
            self._environment,
            self._codec,
            max_turns=self._config.max_turns,
            timeout_s=self._config.timeout_s,
            has_manager=head is not None,
            alone=alone,
        )
        chooser = self._chooser(head, talk, sampling, seed)
        try:
            opened = self._opened(talk, requests, known, seed, first)
            for sample in [sample for sample, prompt in opened.items() if len(prompt) > self._longest_prompt(head)]:
                talk.fail(sample, "error: there is no room for its opening line in the model's context")
                del opened[sample]
            begun = [replace(r, prompt=opened[r.sample_id]) for r in requests if r.sample_id in opened]
            completions = self._engine.generate(begun, sampling, seed=seed, partner=talk, chooser=chooser)
        finally:
            talk.close()
        had = {request.sample_id: (request, _nothing(request)) for request in requests}
        had |= {request.sample_id: (request, one) for request, one in zip(begun, completions, strict=True)}
        return [self._dialogue(request, completion, known, talk, chooser) for request, completion in had.values()]

    def _dialogue(
        self,
        request: Request,
        completion: Completion,
        known: Mapping[int, dict[str, Any]],
        talk: Conversations,
        chooser: ManagerChooser | None,
    ) -> Dialogue:
        sample, record = request.sample_id, talk.record(request.sample_id)
        turns = len(completion.turn_starts)
        self._note_options(record["turns"], completion)
        return Dialogue(
            request=request,
            completion=completion,
            has_failed=talk.has_failed(sample),
            metadata=json.dumps(known[sample] | {CONVERSATION: record}, ensure_ascii=False),
            offered=chooser.offered(sample, turns) if chooser else np.zeros((turns, 0), np.bool_),
        )

    def _note_options(self, turns: list[dict[str, Any]], completion: Completion) -> None:
        """Note each turn's option, and whether it was carried out; a turn that failed has no record.

        Raises ContractError for a check that raises, or does not give a finite number for each reply.
        """
        names = [self._options[option] for option in completion.options[: len(turns)]]
        for turn, name in zip(turns, names, strict=False):
            turn["option"] = name
        if self._check is None or not names:
            return
        ends = [*completion.turn_starts[1:], len(completion.tokens)]
        spoken = [
            completion.tokens[begin:end][completion.sampled[begin:end]]
            for begin, end in zip(completion.turn_starts, ends, strict=True)
        ][: len(names)]
        replies = self._codec.decode_replies(spoken)
        with user_code("manager.check: must give a number for each reply"):
            found = [float(value) for value in self._check(names, replies)]
        if len(found) != len(names) or not np.isfinite(found).all():
            raise ContractError(
                f"manager.check: must give a finite number for each of {len(names)} replies, got {found}"
            )
        for turn, value in zip(turns, found, strict=True):
            turn["check"] = value

    def _chooser(
        self, head: OptionHead | None, talk: Conversations, sampling: SamplingConfig, seed: int
    ) -> ManagerChooser | None:
        if head is None:
            return None
        tokens = option_ids(self._codec.tokenizer, self._options)
        greedy = sampling.temperature == 0
        return ManagerChooser(head, self._options, tokens, talk.offers, seed=seed, greedy=greedy)

    def _longest_prompt(self, head: OptionHead | None) -> int:
        return self._engine.context - (1 if head is None else 2)

    def _opened(
        self,
        talk: Conversations,
        requests: Sequence[Request],
        known: Mapping[int, dict[str, Any]],
        seed: int,
        first: dict[int, npt.NDArray[np.int32]],
    ) -> dict[int, npt.NDArray[np.int32]]:
        """Prompt and opening line of each conversation that did begin, by sample id.

        Raises ContractError where samples of one prompt do not begin alike.
        """
        texts = self._codec.decode_prompts([request.prompt for request in requests])
        lines = talk.begin(
            {
                request.sample_id: Opening(
                    prompt=text, metadata=known[request.sample_id], seed=_luck(seed, request.group_id)
                )
                for request, text in zip(requests, texts, strict=True)
            }
        )
        for request in requests:
            line = lines.get(request.sample_id)
            if line is not None and not np.array_equal(first.setdefault(request.group_id, line), line):
                raise ContractError(
                    "environment: conversations that begin with the same prompt and seed must have the same opening "
                    f"line, got two for {known[request.sample_id]!r:.80}; take all chance from the seed of reset"
                )
        return {r.sample_id: np.concatenate([r.prompt, lines[r.sample_id]]) for r in requests if r.sample_id in lines}


def _entries(metadata: str) -> dict[str, Any]:
    """The metadata of a prompt. Raises ContractError where it has the entry that conversations are written into."""
    found: dict[str, Any] = json.loads(metadata)
    if CONVERSATION in found:
        raise ContractError(
            f"environment: the metadata of prompts must have no entry {CONVERSATION!r}, got {metadata:.80}; the "
            "conversation itself is written there, so give the column another name"
        )
    return found


def _luck(seed: int, group: int) -> int:
    """The environment's seed: one for all samples of a prompt, so that they begin in the same state."""
    return int(np.random.SeedSequence((seed, group)).generate_state(1)[0])


def _nothing(request: Request) -> Completion:
    """A conversation that did not begin."""
    return Completion(
        sample_id=request.sample_id,
        tokens=np.zeros(0, np.int32),
        sampled=np.zeros(0, np.bool_),
        logprobs=np.zeros(0, np.float32),
        turn_starts=(),
        finish="length",
    )
