"""The collector keeps the buffer filled with scored chunks.

    prompts --rollout pool--> rollouts --reward pool--> scores --> buffer

Consumes: prompts, published weights. Waits for: nothing; it only reacts to the pump's events. Unblocked by: free
workers.

The contents of a chunk depend on the ledger and the configuration alone, not on the number of workers or on which of
them is free. So one worker and five workers give the same samples, also when they are ahead of the learners: the
samples of a step are issued when their version is published, and groups that replace those which were left out when
the step is the next to be trained, and neither at any other time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.faults import Fault, RunError
from cluster.halving import DivisibleWork, submit_divisible
from cluster.pool import Pool
from pipeline.config.loop_config import LoopConfig
from pipeline.samples.buffer import Buffer
from pipeline.samples.chunk import Chunk, State
from pipeline.samples.deadly import GENERATING, REFERENCE, SCORING, DeadlySamples
from pipeline.samples.limits import check_failed, check_refills
from pipeline.samples.published import Versions

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.reference import ReferenceReport
    from actors.reward.worker import RewardReport
    from actors.rollout.worker import RolloutReport
    from pipeline.encoding.prompt_stream import PromptStream

    Send = Callable[[Any, int, frozenset[int]], tuple[ObjectRef, ...]]
    Done = Callable[[Any, tuple[ObjectRef, ...]], None]

# share of a call's deadline that a worker may spend on scoring; samples that are not scored by then get no reward, and
# the worker need not be replaced
_SHARE = 0.9


@dataclass(slots=True)
class CollectionCounts:
    """What the pools did since the last step.

    action_tokens: number of generated tokens. generate_s: seconds of generation, as the workers measured them, summed.
    batches_split: number of calls of the reward function that failed and were made again sample by sample. searches:
    number of searches for a sample that kills or hangs its worker.
    """

    action_tokens: int = 0
    generate_s: float = 0.0
    batches_split: int = 0
    searches: int = 0


class Collector:
    """Takes every sample from its prompt to its score."""

    def __init__(
        self,
        config: LoopConfig,
        prompts: PromptStream,
        rollout: Pool,
        reward: Pool,
        buffer: Buffer,
        say: Callable[[str, str], None],
    ) -> None:
        """Begin with nothing in flight. say(kind, text): tells the user, once for each kind."""
        self.config = config
        self.prompts = prompts
        self.rollout = rollout
        self.reward = reward
        self.ledger = buffer.ledger
        self.buffer = buffer
        self.versions: Versions | None = None
        self.step = -1  # the one to be trained next; none yet
        self.collected = CollectionCounts()
        self.say = say
        self._deadly = DeadlySamples()
        self._lost: Counter[int] = Counter()  # chunk -> how often its rollouts were lost with their node

    def keep_generating(self, step: int, versions: Versions) -> None:
        """Issue the samples of the steps that the newest weights sample; call it before each step.

        At the start of a run these are the first max_staleness + 1 steps, later it is the one that far ahead.
        """
        self.step, self.versions = step, versions
        newest = max((chunk.step for chunk in self.ledger.open.values()), default=step - 1)
        for ahead in range(newest + 1, step + self.config.max_staleness + 1):
            self._issue(ahead, self.config.batch.prompts)
        self._refill()

    def reissue(self, versions: Versions) -> None:
        """Generate every open chunk of the ledger again, with the same samples, seeds and weights.

        After a rollback, these are the chunks that were in flight when the commit was made.
        """
        self.versions = versions
        for chunk in list(self.ledger.open.values()):
            self._generate(chunk)

    def renew(self) -> None:
        """Generate the samples that wait once more, since the node that holds them is about to leave."""
        for chunk in list(self.ledger.open.values()):
            if chunk.state is not State.ISSUED:
                self.buffer.forget(chunk.number)
                self._generate(self.ledger.reissue(chunk.number))

    def _refill(self) -> None:
        """Replace the groups that were left out of the step that is trained next, once all the others are scored.

        Earlier, or for a later step, the prompts would depend on which worker answers first.
        """
        chunks = self.ledger.of_step(self.step)
        if all(chunk.state is State.SCORED for chunk in chunks):
            found = sum(len(chunk.trainable()) for chunk in chunks)
            self._issue(self.step, self.config.batch.prompts - found // self.config.batch.group_size)

    def _issue(self, step: int, groups: int) -> None:
        """Issue so many groups of fresh prompts for a step."""
        check_refills(self.config.batch, self.ledger, step, groups)
        per_chunk = self.config.rollout.chunk_size // self.config.batch.group_size
        while groups > 0:
            self._generate(self.ledger.issue(min(groups, per_chunk), step=step, version=self.buffer.sampled_by(step)))
            groups -= per_chunk

    def _generate(self, chunk: Chunk, begun: ObjectRef | None = None) -> None:
        """begun: its Rollouts so far, if some of its replies are to be gone on with."""
        if chunk.step >= self.config.steps:
            return  # it waits until the run is extended, so that a run of N and N more steps is one of 2N
        prompts = self.prompts.draw(range(chunk.first_group, chunk.first_group + chunk.groups)).table
        base, config = chunk.attempt, self.config  # the pool's own count of attempts is added to `base`
        pause_after = 0 if config.repeats or config.environment.name else config.rollout.segment_tokens

        def send(worker: Any, attempt: int, without: frozenset[int]) -> tuple[ObjectRef, ...]:
            assert self.versions is not None
            weights = self.versions[chunk.version] if config.repeats else self.versions.newest
            call = (worker.generate if begun is None else worker.go_on).options(num_returns=2)
            given = (prompts, chunk.group_size) if begun is None else (begun,)
            rest = (chunk.number, base + attempt, weights)
            return tuple(call.remote(*given, *rest, without=without, pause_after=pause_after))

        def done(report: RolloutReport, data: tuple[ObjectRef, ...]) -> None:
            if not self.ledger.fence(chunk.number, base):
                return
            asked, found = chunk.version, report.version
            assert found == asked or (found > asked and not config.repeats), f"version {found}, asked for {asked}"
            self.collected.action_tokens += report.action_tokens
            self.collected.generate_s += report.seconds
            if report.paused:
                self._generate(chunk, data[0])
                return
            self.ledger.generated(chunk.number)
            self.buffer.put_rollouts(chunk.number, data[0])
            self._score(chunk)

        # lost weights can only be made by going back to a commit
        again = {} if begun is None else {"on_input_lost": lambda: self._again(chunk.number, base)}
        retried = {"on_retry": lambda: self.ledger.retried(chunk.number)}
        self._submit(self.rollout, GENERATING, chunk, send, done, **retried, **again)

    def _score(self, chunk: Chunk) -> None:
        rollouts = self.buffer.rollouts(chunk.number)
        base, within_s = chunk.attempt, _SHARE * self.config.cluster.call_timeout_s

        def send(worker: Any, attempt: int, without: frozenset[int]) -> tuple[ObjectRef, ...]:
            return tuple(
                worker.score.options(num_returns=2).remote(
                    rollouts, chunk.number, base + attempt, without=without, within_s=within_s
                )
            )

        def done(report: RewardReport, data: tuple[ObjectRef, ...]) -> None:
            if not self.ledger.fence(chunk.number, base):
                return
            failed = report.failures | self._deadly.of(chunk.number)
            self._say_what_failed(chunk, report, failed)
            self.ledger.scored(chunk.number, failed, report.flat_groups if self.config.batch.dynamic_sampling else ())
            self.buffer.put_scores(chunk.number, data[0])
            check_failed(self.config, self.ledger, self._deadly)
            if chunk.step == self.step:
                self._refill()

        self._submit(self.reward, SCORING, chunk, send, done, on_input_lost=lambda: self._again(chunk.number, base))

    def refer(self, reference: Pool, number: int, found: dict[int, ObjectRef]) -> None:
        """Begin the reference's log-probs of a scored chunk; they are put into `found` under the chunk's number.

        Call `quarantine` afterwards: it deals with samples that killed or hung a reference worker.
        """
        chunk, rollouts = self.ledger.open[number], self.buffer.rollouts(number)

        def send(worker: Any, attempt: int, without: frozenset[int]) -> tuple[ObjectRef, ...]:
            return tuple(worker.logprobs.options(num_returns=2).remote(rollouts, number, attempt, without))

        def done(report: ReferenceReport, data: tuple[ObjectRef, ...]) -> None:
            found[number] = data[0]

        self._submit(reference, REFERENCE, chunk, send, done)

    def quarantine(self, chunks: Iterable[int]) -> bool:
        """Quarantine samples of scored chunks that killed or hung a worker since; returns whether there were any.

        Fresh groups are issued in place of the groups of these samples.
        """
        found = {number: self._deadly.of(number) for number in chunks}
        new = {number: own for number, own in found.items() if own.keys() - self.ledger.open[number].quarantined.keys()}
        for number, own in new.items():
            self.ledger.quarantine(number, own)
        if new:
            self._refill()
        return bool(new)

    def _submit(
        self, pool: Pool, doing: str, chunk: Chunk, send: Send, done: Done, **callbacks: Callable[[], None]
    ) -> None:
        """Submit one call over a chunk to a pool; a sample that kills or hangs its worker is found and left out.

        Its whole group is left out with it, since a group that lacks a member cannot be trained on.
        """
        phase, deadly = f"{doing} chunk {chunk.number}", self._deadly.during(doing, chunk.number)
        generated_without = self._deadly.during(GENERATING, chunk.number) if doing != GENERATING else {}
        without = {sample // chunk.group_size for sample in generated_without}
        everything = range(chunk.first_sample, chunk.first_sample + chunk.samples)

        def search() -> None:
            self.collected.searches += 1
            self.say(
                "search",
                f"{phase} has killed or hung its workers {self.config.cluster.max_attempts} times; looking for the "
                "sample that does it",
            )

        def found(sample: int, why: str) -> None:
            deadly[sample] = f"error: {doing} it {why}"
            self._say_quarantined(sample, deadly[sample])
            check_failed(self.config, self.ledger, self._deadly)

        work = DivisibleWork(
            phase=phase,
            items=[sample for sample in everything if sample // chunk.group_size not in without],
            group_of=lambda sample: sample // chunk.group_size,
            send=send,
            on_done=lambda report, data, _: done(report, data),
            on_search=search,
            on_found=found,
            timeout_s=self.config.cluster.call_timeout_s,
            **callbacks,
        )
        submit_divisible(pool, work, known=deadly)

    def _say_what_failed(self, chunk: Chunk, report: RewardReport, failed: Mapping[int, str]) -> None:
        """Tell the user what failed in scoring, once for each kind, since a count in the metrics is easily missed."""
        self.collected.batches_split += report.batches_split
        if report.batches_split:
            self.say(
                "split",
                f"scoring chunk {chunk.number}: {report.why_split}; its samples were scored one by one (counted as "
                "incident/batches_split)",
            )
        if failed:
            self._say_quarantined(*next(iter(failed.items())))

    def _say_quarantined(self, sample: int, why: str) -> None:
        self.say("quarantined", f"sample {sample} is quarantined, not trained on: {why} (all: raylign ledger)")

    def _again(self, number: int, attempt: int) -> None:
        """Generate the chunk's samples again, since its rollouts were lost with their node.

        Raises RunError when they have been lost `cluster.max_attempts` times.
        """
        if not self.ledger.fence(number, attempt):
            return  # they are made again already
        self._lost[number] += 1  # not the attempts: those made again since a node would leave are no losses
        if self._lost[number] >= self.config.cluster.max_attempts:
            raise RunError(
                "reward",
                f"scoring chunk {number}",
                f"its rollouts were lost {self._lost[number]} times (cluster.max_attempts)",
                fault=Fault.INPUT_LOST,
            )
        self.buffer.forget(number)
        self._generate(self.ledger.reissue(number))
