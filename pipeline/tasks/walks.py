"""Random walks: find the shortest path to a goal, from demonstrations that are random walks.

The field's learning benchmark for RLHF on a CPU. A directed graph of 21 nodes, named by letters, has each edge with
probability 0.1; node `a` is the goal. A prompt is a start node, a response the nodes after it. The demonstrations are a
thousand random walks of at most ten nodes, so a model that imitates them arrives late or never. The reward is the
optimality of the path: random walks score 0.790 on average, where a perfect imitator starts; a shortest path from every
node scores 1. Graph and walks are drawn from NumPy's frozen `RandomState(1002)`, as the field does.

Left out: held-out start nodes. There are only 20, the task is to learn the graph, and every start is evaluated.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.tasks.task import Demonstration, PromptText, Split

NODES = 21
GOAL = 0
EDGE_PROBABILITY = 0.1
MAX_NODES = 10  # of a walk, start and goal included
WALKS = {"train": 1000, "heldout": 200}
SEED = 1002
LETTERS = ascii_lowercase[:NODES]


class RandomWalks:
    """The task; see the module."""

    name = "walks"
    reward = "pipeline.tasks.walks:optimality"

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Write a tokenizer of one token a node; `vocabulary` is ignored."""
        from pipeline.tasks.tokenizers import character_tokenizer

        character_tokenizer(LETTERS, folder)

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """Random walks: the first node is the prompt, the others are the response."""
        return [Demonstration(prompt=walk[0], response=walk[1:]) for walk in walks()[split]]

    def prompts(self, split: Split) -> list[PromptText]:
        """Every node except the goal, in both splits."""
        return [
            PromptText(text=LETTERS[node], metadata={"shortest": shortest_lengths()[node]})
            for node in range(NODES)
            if node != GOAL
        ]

    def layout(self, line: str) -> str:
        """The start node that was typed."""
        return line.strip().lower()


def optimality(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """(10 - length) / (10 - shortest length) of each walk, in [0, 1]; 1 for a shortest path.

    length: nodes from start to goal, both included. A walk that takes a missing edge, or does not arrive within 10
    nodes, has length 10. Text after the goal is ignored.
    """
    return [_optimality(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def _optimality(text: str) -> float:
    nodes = [LETTERS.find(letter) for letter in text]  # -1: no such node
    if not nodes or nodes[0] < 0:
        return 0.0
    length = walk_length(nodes)
    return (MAX_NODES - length) / (MAX_NODES - shortest_lengths()[nodes[0]])


def walk_length(nodes: list[int]) -> int:
    """Nodes from the start to the goal, at most 10; 10 if the walk takes a missing edge before it arrives."""
    edges = adjacency()
    for place, node in enumerate(nodes[:MAX_NODES]):
        if node < 0 or (place > 0 and not edges[nodes[place - 1], node]):
            return MAX_NODES
        if node == GOAL:
            return place + 1
    return MAX_NODES


@cache
def adjacency() -> npt.NDArray[np.bool_]:
    """The graph: [u, v] is true if there is an edge from u to v, (21, 21). The goal leads only to itself."""
    return _draw()[0]


@cache
def walks() -> dict[Split, list[str]]:
    """The random walks of each split, as letters.

    The first 1,000 are the field's; the held-out ones continue the same stream.
    """
    drawn = _draw()[1]
    return {"train": drawn[: WALKS["train"]], "heldout": drawn[WALKS["train"] :]}


@cache
def shortest_lengths() -> tuple[int, ...]:
    """Nodes of a shortest path from each node to the goal, at most 10: breadth-first, backwards from the goal."""
    lengths = [MAX_NODES] * NODES
    lengths[GOAL], queue = 1, deque([GOAL])
    while queue:
        node = queue.popleft()
        for before in np.flatnonzero(adjacency()[:, node]):
            if lengths[before] > lengths[node] + 1:
                lengths[before] = lengths[node] + 1
                queue.append(int(before))
    return tuple(lengths)


@cache
def _draw() -> tuple[npt.NDArray[np.bool_], list[str]]:
    """The graph and the walks, from one stream of random numbers; RandomState's never changes with NumPy."""
    random = np.random.RandomState(SEED)
    edges = np.zeros((NODES, NODES), np.bool_)
    while not edges.any(axis=1).all():
        edges = random.rand(NODES, NODES) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(edges, False)
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    return edges, [_random_walk(edges, random) for _ in range(sum(WALKS.values()))]


def _random_walk(edges: npt.NDArray[np.bool_], random: np.random.RandomState) -> str:
    node = GOAL
    while node == GOAL:
        node = int(random.randint(NODES))
    nodes = [node]
    while node != GOAL and len(nodes) < MAX_NODES:
        node = int(random.choice(np.flatnonzero(edges[node])))
        nodes.append(node)
    return "".join(LETTERS[node] for node in nodes)
