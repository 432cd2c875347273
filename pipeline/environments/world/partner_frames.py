"""What the partner can say: the frame shows its mood, the opener its reaction to the reply, the closer its trust.

So the partner's last line alone shows the whole state of the conversation, except the number of replies so far.
"""

from __future__ import annotations

from pipeline.environments.world.grammar import FrameSet

MOODS: dict[str, tuple[str, ...]] = {
    "left": (
        "I am leaving, my {noun} is none of your business.",
        "I will talk to someone else about my {noun}.",
        "We are done, and so is my {noun}.",
        "I walk away from you and my {noun}.",
    ),
    "angry": (
        "I am so angry about my {noun}.",
        "My {noun} makes me furious.",
        "I could scream because of my {noun}.",
        "I have had enough of my {noun}.",
        "It is an outrage how they treat my {noun}.",
        "I want to throw my {noun} out of the window.",
        "Everybody lied to me about my {noun}.",
        "I am mad at everyone because of my {noun}.",
    ),
    "sad": (
        "My {noun} went badly, and nobody called.",
        "I cried about my {noun} all night.",
        "I am so sad about my {noun}.",
        "My heart is heavy because of my {noun}.",
        "I miss the days before my {noun}.",
        "I lost all hope for my {noun}.",
        "Since my {noun} I feel so alone.",
        "I failed with my {noun}, and it hurts.",
    ),
    "worried": (
        "I do not know what to do about my {noun}.",
        "I am worried about my {noun}.",
        "What if my {noun} goes wrong?",
        "I cannot sleep because of my {noun}.",
        "I am not ready for my {noun}.",
        "I have so many questions about my {noun}.",
        "I keep thinking about what may happen to my {noun}.",
        "I am afraid of my {noun}.",
    ),
    "bored": (
        "My {noun} is so dull.",
        "It is the same with my {noun} every day.",
        "I yawn when I think of my {noun}.",
        "Nothing ever happens with my {noun}.",
        "I am bored of my {noun}.",
        "Even my {noun} is no fun today.",
        "My {noun} could put anyone to sleep.",
        "I sit here with my {noun} and count the hours.",
    ),
    "cheerful": (
        "I feel good about my {noun} today.",
        "My {noun} makes me smile.",
        "I can laugh about my {noun} now.",
        "I am happy with my {noun}.",
        "My {noun} is going well.",
        "I look forward to my {noun}.",
        "I am proud of my {noun}.",
        "My {noun} was a success.",
    ),
    "content": (
        "I am at peace with my {noun}, thank you.",
        "All is well with my {noun}, thanks to you.",
        "I could not be happier about my {noun}.",
        "You made my day, and my {noun} too.",
    ),
}

REACTIONS: dict[str, tuple[str, ...]] = {
    "opening": ("", "Hi.", "Hello there.", "Good morning.", "You know what?"),
    "better": ("That helps.", "Thank you.", "Yes.", "That is kind."),
    "same": ("Hm.", "Maybe.", "Perhaps.", "If you say so."),
    "worse": ("That does not help.", "No.", "You do not listen.", "Ouch."),
    "confused": ("What?", "I do not understand you.", "Sorry?", "Come again?"),
}

TRUST: dict[str, tuple[str, ...]] = {
    "closed": ("", "That is all.", "It is what it is.", "So it goes.", "What can I say?"),
    "open": (
        "I can tell you everything.",
        "It is good that you asked.",
        "I trust you.",
        "With you I can talk.",
    ),
}

Shown = tuple[str, str, str]
"""What a line of the partner shows: mood (a key of MOODS), reaction (a key of REACTIONS), trust (a key of TRUST)."""
LAST_WORDS = ("left", "content")  # moods in which the conversation is over; such a line shows no trust


def _partner() -> dict[Shown, FrameSet]:
    shown: dict[Shown, FrameSet] = {}
    for mood, frames in MOODS.items():
        for reaction, openers in REACTIONS.items():
            for trust, closers in {"closed": ("",)}.items() if mood in LAST_WORDS else TRUST.items():
                shown[mood, reaction, trust] = FrameSet(openers=openers, frames=frames, closers=closers)
    return shown


PARTNER: dict[Shown, FrameSet] = _partner()
