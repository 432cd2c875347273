"""The things that twenty questions is played with, and the properties of each."""

from __future__ import annotations

QUESTIONS: dict[str, str] = {
    "alive": "Is it alive?",
    "animal": "Is it an animal?",
    "flies": "Can it fly?",
    "swims": "Can it swim?",
    "eaten": "Do people eat it?",
    "large": "Is it larger than a person?",
    "indoors": "Do you find it in a house?",
    "wheels": "Does it have wheels?",
    "power": "Does it need power?",
    "sound": "Does it make a sound?",
    "round": "Is it round?",
    "soft": "Is it soft?",
}
"""The question that asks for each property."""

ANSWERS: dict[str, tuple[str, str]] = {
    "alive": ("Yes, living.", "No, lifeless."),
    "animal": ("Yes, a beast.", "No, no creature."),
    "flies": ("Yes, winged.", "No, grounded."),
    "swims": ("Yes, aquatic.", "No, terrestrial."),
    "eaten": ("Yes, edible.", "No, inedible."),
    "large": ("Yes, big.", "No, small."),
    "indoors": ("Yes, indoors.", "No, outdoors."),
    "wheels": ("Yes, wheeled.", "No, wheelless."),
    "power": ("Yes, powered.", "No, powerless."),
    "sound": ("Yes, noisy.", "No, silent."),
    "round": ("Yes, circular.", "No, angular."),
    "soft": ("Yes, tender.", "No, hard."),
}
"""The answers to each question. Each ends with a word that stands nowhere else, so it says by itself what was asked.

A small model learns to read such answers soon. It hardly learns to read a bare yes or no, because it must first find
the question that it belongs to.
"""

THINGS: dict[str, frozenset[str]] = {
    name: frozenset(properties.split())
    for name, properties in {
        "cat": "alive animal indoors sound soft",
        "eagle": "alive animal flies sound",
        "duck": "alive animal flies swims eaten sound soft",
        "trout": "alive animal swims eaten",
        "whale": "alive animal swims large sound",
        "horse": "alive animal large sound",
        "bee": "alive animal flies sound soft",
        "spider": "alive animal indoors",
        "oak": "alive large",
        "rose": "alive indoors soft",
        "cactus": "alive indoors",
        "apple": "alive eaten indoors round",
        "bread": "eaten indoors soft",
        "cheese": "eaten indoors",
        "pea": "alive eaten indoors round soft",
        "car": "large wheels power sound",
        "plane": "flies large wheels power sound",
        "bicycle": "wheels",
        "skateboard": "wheels indoors",
        "boat": "swims large",
        "radio": "indoors power sound",
        "lamp": "indoors power",
        "clock": "indoors power sound round",
        "ball": "indoors round",
        "pillow": "indoors soft",
        "piano": "indoors large sound",
        "moon": "large round",
        "kite": "flies soft",
        "balloon": "flies indoors round soft",
        "drum": "indoors round sound",
        "coin": "round",
        "stone": "",
    }.items()
}
"""The properties of each thing; no two things have the same properties."""
