"""What people talk about: twelve topics, and the nouns that name each topic."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "school": ("exam", "test", "essay"),
    "work": ("job", "interview", "meeting"),
    "pets": ("dog", "cat", "rabbit"),
    "home": ("kitchen", "roof", "garden"),
    "traffic": ("car", "bike", "van"),
    "travel": ("trip", "flight", "hotel"),
    "sport": ("match", "race", "team"),
    "music": ("concert", "song", "guitar"),
    "devices": ("phone", "laptop", "printer"),
    "food": ("cake", "soup", "dinner"),
    "parties": ("party", "wedding", "picnic"),
    "money": ("bill", "loan", "rent"),
}
NOUNS: dict[str, str] = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
"""The topic of each noun."""
