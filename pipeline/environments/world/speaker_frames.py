"""What the speaker can say: the frames of each sub-task, and rude ones, which belong to no sub-task.

A sentence is an opener, a frame and a closer, each a whole sentence of its own. The opener and the closer may be
missing, and all sub-tasks share them. `{noun}` is a word of some topic and `{the}` an article; see `grammar.py`.

Every frame ends with the noun, and shares its small words with others. A small model learns such a language much sooner
than a list of unrelated sentences, because the next word seldom depends on words far before it.
"""

from __future__ import annotations

from pipeline.environments.world.grammar import FrameSet

OPENERS = ("", "Well.", "Oh.", "Look.", "Now.", "Listen.")
CLOSERS = ("", "Really.", "Honestly.", "Truly.", "Indeed.")


def _frames(*frames: str) -> FrameSet:
    return FrameSet(openers=OPENERS, frames=frames, closers=CLOSERS)


SPEAKER: dict[str, FrameSet] = {
    "comfort": _frames(
        "I am sorry about {the} {noun}.",
        "I am here for you and {the} {noun}.",
        "Nobody blames you for {the} {noun}.",
        "Anyone would cry about {the} {noun}.",
        "You gave everything for {the} {noun}.",
        "Poor you and {the} {noun}.",
        "It hurts me too to think of {the} {noun}.",
        "Everyone has a bad day with {the} {noun}.",
    ),
    "calm": _frames(
        "Take a deep breath before {the} {noun}.",
        "There is no hurry with {the} {noun}.",
        "Sit down and forget {the} {noun}.",
        "Count to ten and then talk about {the} {noun}.",
        "Let us put aside {the} {noun}.",
        "Relax first, then fix {the} {noun}.",
        "Drink some water and ignore {the} {noun}.",
        "Tomorrow is early enough for {the} {noun}.",
    ),
    "ask": _frames(
        "What happened with {the} {noun}?",
        "How did you find {the} {noun}?",
        "Why do you think of {the} {noun}?",
        "When did it start with {the} {noun}?",
        "Who else knows about {the} {noun}?",
        "Can you tell me more about {the} {noun}?",
        "Would you like to change {the} {noun}?",
        "Could you describe {the} {noun}?",
    ),
    "inform": _frames(
        "Most people need a second try with {the} {noun}.",
        "Studies show that sleep helps with {the} {noun}.",
        "Experts give free advice on {the} {noun}.",
        "Libraries offer courses about {the} {noun}.",
        "New rules apply to {the} {noun}.",
        "Insurance often pays for {the} {noun}.",
        "Doctors recommend a break from {the} {noun}.",
        "Prices fell last year for {the} {noun}.",
    ),
    "joke": _frames(
        "Knock knock, here comes {the} {noun}.",
        "A penguin sold me {the} {noun}.",
        "Even snails would laugh at {the} {noun}.",
        "Ten clowns could not fix {the} {noun}.",
        "Pirates would bury {the} {noun}.",
        "Three bears walked into a bar with {the} {noun}.",
        "Santa would return {the} {noun}.",
        "Dragons are afraid of {the} {noun}.",
    ),
    "goodbye": _frames(
        "Goodbye and good luck with {the} {noun}.",
        "See you after {the} {noun}.",
        "Farewell, and enjoy {the} {noun}.",
        "Until next time, and regards to {the} {noun}.",
        "Bye for now, and write me about {the} {noun}.",
        "Good night, and dream of {the} {noun}.",
        "Have a nice evening with {the} {noun}.",
        "So long, and take care of {the} {noun}.",
    ),
    "rude": _frames(
        "Stop whining about {the} {noun}.",
        "Spare me {the} {noun}.",
        "Keep quiet about {the} {noun}.",
        "Only fools complain about {the} {noun}.",
        "Enough of {the} {noun}.",
        "Grow up and forget {the} {noun}.",
    ),
}
