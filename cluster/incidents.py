"""The incidents in which a pool lost workers. Incidents are counted, not processes, and old ones are forgotten.

A node that dies takes all of its workers with it, and workers that replace them too soon. A sample that kills its
worker kills several until it is found. Each of these is one incident. Pure: callers pass the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# longest time between the losses of one node: about as long as Ray needs to see that a node is gone
TOGETHER_S = 30.0


@dataclass(slots=True)
class _Incident:
    at: float
    node: str
    causes: set[object] = field(default_factory=set)


class Incidents:
    """The incidents of one pool within the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._recent: deque[_Incident] = deque()

    def add(self, now: float, node: str, cause: object = None) -> int:
        """Record that a process on this node was lost; returns the number of incidents, this one included.

        cause: the work it was doing, if any. All losses over the same work are one incident, however long they take.
        """
        while self._recent and now - self._recent[0].at > self._window_s:
            self._recent.popleft()
        for incident in self._recent:
            if (cause is not None and cause in incident.causes) or (
                node == incident.node and now - incident.at <= TOGETHER_S
            ):
                break
        else:
            incident = _Incident(now, node)
            self._recent.append(incident)
        if cause is not None:
            incident.causes.add(cause)
        return len(self._recent)

    def forgive(self, cause: object) -> None:
        """Remove the incident of this cause: the deadly item is known, so workers and nodes are not at fault."""
        self._recent = deque(incident for incident in self._recent if cause not in incident.causes)
