"""The assembler: an actor beside the driver that makes a step's experience and writes it to disk.

It is an actor, not a Ray task: Ray ends the idle process of a task after a second, and the next one would import torch
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from actors.experience import Experience
from cluster.storage import StoredFile
from pipeline.assembly.assembly import Assembly, assemble, turns_of_step
from pipeline.assembly.joined import Counts
from pipeline.assembly.report import AssemblyReport


class Assembler:
    """The pure function `assemble` and the experience log as an actor, so that no token passes through the driver."""

    def assemble(
        self, how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table
    ) -> tuple[AssemblyReport, pa.Table]:
        """See `assemble`."""
        return assemble(how, sample_ids, counts, *tables)

    def turns(
        self, how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table
    ) -> tuple[int, pa.Table]:
        """See `turns_of_step`."""
        return turns_of_step(how, sample_ids, counts, *tables)

    def write(self, path: str, table: pa.Table) -> StoredFile:
        """Write a step's experience to Parquet."""
        return Experience(table).write(Path(path))
