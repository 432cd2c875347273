"""A cache of tables, each named by the hash of everything it depends on, and used only if its checksum is right."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.storage import Folder, StoredFile

CACHE = "cache"  # the folder beside a run that runs share: texts in tokens, by their content

log = logging.getLogger(__name__)


class Cache:
    """A folder of Parquet files, each with an account of it as JSON.

    Several runs may share it: files appear whole, and one name has only one content.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._folder = Folder(folder)

    def find(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """(Parquet file, account) of this name; None if there are none, or if the file is damaged."""
        try:
            record = json.loads(self._folder.read_text(f"{name}.json"))
            damage = self._folder.damage(StoredFile(**record["file"]))
            account: dict[str, Any] = record["account"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            damage = f"{name}.json is not what was written ({error})"
        if damage:
            log.warning("cache %s: %s; it is made again", self._path, damage)
            return None
        return self._path / f"{name}.parquet", account

    def keep(self, name: str, table: pa.Table, account: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Write table and account, the account last. Raises OSError."""
        stored = self._folder.write_file(
            f"{name}.parquet", lambda draft: pq.write_table(table, draft, compression="zstd")
        )
        self._folder.write_text(f"{name}.json", json.dumps({"file": asdict(stored), "account": account}))
        return self._path / f"{name}.parquet", account


def content_hash(table: pa.Table, *settings: object) -> str:
    """xxh3-128 of a table's rows and of settings, in hexadecimal; Arrow's chunking does not matter."""
    digest = xxhash.xxh3_128(json.dumps([table.column_names, *map(str, settings)]).encode())
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()
