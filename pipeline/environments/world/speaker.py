"""A mediocre speaker: it mostly means well, often misses the point, and is sometimes rude.

A model is first fine-tuned on its conversations, so reinforcement learning then has much to improve.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pipeline.environments.world.environment import draw, opening_line, partner_line
from pipeline.environments.world.layout import speaker_grammar
from pipeline.environments.world.rules import EFFECTS, OPENING_MOODS, RUDE, SUBTASKS, Deed, State
from pipeline.environments.world.topics import NOUNS

WELL_CHOSEN, AT_RANDOM, IMPOLITE = 0.4, 0.5, 0.1  # shares of the ways it chooses a sub-task; their sum is 1
TO_THE_POINT = 0.65


def mediocre_play(state: State) -> dict[Deed, float]:
    """The probability of each deed of the mediocre speaker; a `solve.Play`."""
    good = [subtask for subtask in SUBTASKS if EFFECTS[True][state.mood, subtask] in ("settles", "helps much")]
    shares = dict.fromkeys(SUBTASKS, AT_RANDOM / len(SUBTASKS)) | {RUDE: IMPOLITE}
    for subtask in good:
        shares[subtask] += WELL_CHOSEN / len(good)
    return {
        Deed(subtask=subtask, to_the_point=aim): share * (TO_THE_POINT if aim else 1 - TO_THE_POINT)
        for subtask, share in shares.items()
        for aim in (True, False)
    }


def say(random: Random, deed: Deed, noun: str) -> str:
    """A random sentence that does this deed when the partner talks about `noun`.

    A sentence to the point names the noun itself ("your exam"); another names a noun of another topic ("the dog").
    """
    if deed.to_the_point:
        return speaker_grammar.generate(random, deed.subtask, noun, ("your",))
    other = random.choice([other for other in NOUNS if NOUNS[other] != NOUNS[noun]])
    return speaker_grammar.generate(random, deed.subtask, other, ("the",))


def conversations(seed: int) -> Iterator[list[str]]:
    """An endless stream of the mediocre speaker's conversations: lines, alternately the partner's and the speaker's."""
    random = Random(seed)
    while True:
        mood = random.choices(list(OPENING_MOODS), list(OPENING_MOODS.values()))[0]
        state, noun = State(mood=mood), random.choice(list(NOUNS))
        lines = [opening_line(random, mood, noun)]
        while not state.over:
            play = mediocre_play(state)
            deed = random.choices(list(play), list(play.values()))[0]
            after = draw(random, state, deed)
            lines += [say(random, deed, noun), partner_line(random, state, deed, after, noun)]
            state = after
        yield lines
