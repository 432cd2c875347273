"""The data report of a run: what was read, what was left out and why, and what remains.

data-report.json, data-report.md     counts, lengths, and a few rows of each problem
data-excluded.jsonl                  every row that is left out
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage import Folder
from pipeline.config.preparation_config import PreparationConfig
from pipeline.data.config import Kind
from pipeline.data.files import KINDS, Files, TextRow
from pipeline.data.load import LoadedSource
from pipeline.data.problems import DUPLICATE, NO_FAULT, PROBLEMS, REMARKS, Problem
from pipeline.data.sources import sources_of
from pipeline.encoding.cache import CACHE
from pipeline.encoding.encode import QUANTILES, EncodedTable, encode_comparisons, encode_demonstrations
from pipeline.encoding.fit import PromptFit
from pipeline.encoding.prompts import RunPrompts
from pipeline.tasks.task import SPLITS, Split, Task

SHOWN = 5  # rows of each kind of problem that the report names; data-excluded.jsonl names all
_DUPLICATE_MEANS = "an earlier row says the same"
_TOO_LONG, _MERGED = "too many tokens", "same once shortened"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAccount:
    """The part of the report that needs a tokenizer: tables by (kind, split), and fitted prompts by split."""

    encoded: Mapping[tuple[Kind, Split], EncodedTable] = field(default_factory=dict)
    fitted: Mapping[Split, PromptFit] = field(default_factory=dict)


def report_texts(task: Task, run_dir: Path) -> str:
    """Write the report of what was read, before anything is started.

    A line for the terminal; "" for a task that has no files.
    """
    return write_report(task, run_dir) if isinstance(task, Files) else ""


def report_tokens(config: PreparationConfig, task: Task, run_dir: Path, model: str, asked: RunPrompts | None) -> None:
    """Write it again with what a tokenizer has made of it.

    The tables come out of the cache, where the stages have put them.
    """
    if not isinstance(task, Files):
        return
    from actors.models.causal_lm import context_of

    context, cache = context_of(model), run_dir.parent / CACHE
    encoded: dict[tuple[Kind, Split], EncodedTable] = {}
    for split in SPLITS:
        if config.reads_demonstrations:
            encoded["demonstrations", split] = encode_demonstrations(task, split, model, context, cache)
        if config.reads_comparisons:
            encoded["comparisons", split] = encode_comparisons(task, split, model, context, cache)
    write_report(task, run_dir, TokenAccount(encoded=encoded, fitted=asked.fitted if asked else {}))


def write_report(task: Files, folder: Path, measured: TokenAccount | None = None) -> str:
    """Write the three files into `folder`; returns a line for the terminal.

    Raises DataError for data that cannot be used, and OSError.
    """
    measured = measured or TokenAccount()
    record = report(task, measured)
    lines = [json.dumps(row, ensure_ascii=False) for row in excluded(task, measured)]
    target = Folder(folder)
    target.write_text("data-report.json", json.dumps(record, indent=1, ensure_ascii=False))
    target.write_text("data-report.md", to_markdown(record))
    target.write_text("data-excluded.jsonl", "".join(f"{line}\n" for line in lines))
    return summary(record)


def report(task: Files, measured: TokenAccount | None = None) -> dict[str, Any]:
    """The report as JSON."""
    measured = measured or TokenAccount()
    sides = {
        kind: {split: [row for row in task.all_rows(kind) if row.split == split] for split in SPLITS} for kind in KINDS
    }
    return {
        "sources": [_source(sources_of(task.data)[kind], loaded) for kind, loaded in task.loaded.items()],
        "layout": task.layout_kind,
        "rows": {
            kind: {"derived": kind not in task.loaded} | {split: len(rows) for split, rows in sides[kind].items()}
            for kind in KINDS
            if task.all_rows(kind)
        },
        "prompts": _prompts(task.all_rows("prompts")),
        "comparisons": _comparisons(task.all_rows("comparisons")) if task.all_rows("comparisons") else {},
        "tokens": {f"{kind}, {split}": _tokens(table) for (kind, split), table in measured.encoded.items()},
        "asked": {split: _asked(fitted) for split, fitted in measured.fitted.items()},
    }


def excluded(task: Files, measured: TokenAccount | None = None) -> list[dict[str, Any]]:
    """Every row that is left out, as JSON values: kind of data, source, line, problem, detail."""
    measured = measured or TokenAccount()
    found = [_listed(kind, problem) for kind, loaded in task.loaded.items() for problem in loaded.problems]
    for (kind, split), table in measured.encoded.items():
        found += _numbered(kind, task.rows(kind, split), table.excluded, _TOO_LONG)
    for split, fitted in measured.fitted.items():
        rows = task.rows("prompts", split)
        found += [
            *_numbered("prompts", rows, fitted.excluded, _TOO_LONG),
            *_numbered("prompts", rows, fitted.merged, _MERGED),
        ]
    return found


def summary(record: dict[str, Any]) -> str:
    """The report in one line."""
    rows = sum(source["rows"] for source in record["sources"])
    faulty = sum(
        entry["count"]
        for source in record["sources"]
        for kind, entry in source["excluded"].items()
        if kind not in NO_FAULT
    )
    unread = {
        kind: sum(source["excluded"].get(kind, {"count": 0})["count"] for source in record["sources"])
        for kind in NO_FAULT
        if kind != DUPLICATE
    }
    others = "".join(f", {count} with {kind}" for kind, count in unread.items() if count)
    doubled = sum(source["excluded"].get(DUPLICATE, {"count": 0})["count"] for source in record["sources"])
    kinds = ", ".join(f"{sides['train']} + {sides['heldout']} {kind}" for kind, sides in record["rows"].items())
    dialects = "".join(
        f"; {source['kind']} recognised: {source['recognised']}" for source in record["sources"] if source["recognised"]
    )
    return (
        f"data: {rows} rows read, {faulty} faulty{others} and {doubled} repeated left out; {kinds} (training + held "
        f"out){dialects}"
    )


def to_markdown(record: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [
        "# Data",
        summary(record).removeprefix("data: ")[:1].upper() + summary(record).removeprefix("data: ")[1:] + ".",
    ]
    for source in record["sources"]:
        parts += [
            f"## {source['kind']}: {source['source']}",
            f"{source['rows']} rows, read as {source['form']}; {source['kept']} kept.",
        ]
        found = [("left out", source["excluded"]), ("kept, with a remark", source["remarks"])]
        lines = [
            [name, kind, entry["count"], entry["means"], _places(entry["rows"])]
            for name, kinds in found
            for kind, entry in kinds.items()
        ]
        parts += [_table(["", "what", "rows", "meaning", "first"], lines)] if lines else ["Nothing was left out."]
    parts += ["## What there is", f"Laid out as: {record['layout']}."]
    lines = [
        [kind, sides["train"], sides["heldout"], "derived" if sides["derived"] else "given"]
        for kind, sides in record["rows"].items()
    ]
    parts.append(_table(["", "training", "held out", ""], lines))
    parts.append(f"{record['prompts']['distinct']} distinct prompts, of {record['prompts']['beginnings']} beginnings.")
    lengths = {"prompt": record["prompts"]["characters"]} | {
        f"{name} reply": record["comparisons"][name] for name in _NAMES if record["comparisons"]
    }
    parts += ["Characters:", _table(["", *_quantile_names()], [[name, *values] for name, values in lengths.items()])]
    if pairs := record["comparisons"]:
        parts.append(
            f"The better reply is the longer one in {pairs['better_is_longer']:.1%} of the comparisons, as long as the "
            f"worst in {pairs['same_length']:.1%}; "
            f"{pairs['same_prompt']} comparisons share their prompt with another."
        )
    if record["tokens"]:
        columns = ["", "rows", "tokens", "truncated", "replies cut", "left out", *_quantile_names()]
        lines = [
            [name, *(entry[key] for key in _COUNTS), *entry["quantiles"]] for name, entry in record["tokens"].items()
        ]
        parts += ["Tokens of a row:", _table(columns, lines)]
    if record["asked"]:
        columns = ["prompts to ask", "whole", "shortened", "same once shortened", "left out"]
        parts.append(_table(columns, [[split, *entry.values()] for split, entry in record["asked"].items()]))
    return "\n\n".join(parts) + "\n"


_NAMES = ("best", "worst")
_COUNTS = ("rows", "tokens", "truncated", "cut_replies", "excluded")


def _source(name: str, loaded: LoadedSource) -> dict[str, Any]:
    problems = Counter(problem.kind for problem in loaded.problems)
    remarks = Counter(remark for row in loaded.exchanges for remark in row.remarks)
    return {
        "kind": loaded.kind,
        "source": name,
        "form": loaded.form,
        "recognised": loaded.recognised,
        "files": loaded.read,
        "rows": sum(loaded.read.values()),
        "kept": len(loaded.exchanges),
        "excluded": {
            kind: {
                "count": count,
                "means": PROBLEMS.get(kind, _DUPLICATE_MEANS),
                "rows": [[p.source, p.line] for p in loaded.problems if p.kind == kind][:SHOWN],
            }
            for kind, count in problems.most_common()
        },
        "remarks": {
            remark: {
                "count": count,
                "means": REMARKS[remark],
                "rows": [[row.source, row.line] for row in loaded.exchanges if remark in row.remarks][:SHOWN],
            }
            for remark, count in remarks.most_common()
        },
    }


def _prompts(rows: Sequence[TextRow]) -> dict[str, Any]:
    beginnings = {next(turn for turn in row.exchange.prompt if turn.role != "system") for row in rows}
    return {
        "distinct": len(rows),
        "beginnings": len(beginnings),
        "characters": _quantiles([len(row.prompt) for row in rows]),
    }


def _comparisons(rows: Sequence[TextRow]) -> dict[str, Any]:
    best, worst = ([len(row.exchange.replies[place]) for row in rows] for place in (0, -1))
    prompts = Counter(row.prompt for row in rows)
    return {
        "best": _quantiles(best),
        "worst": _quantiles(worst),
        "better_is_longer": float(np.mean(np.array(best) > np.array(worst))),
        "same_length": float(np.mean(np.array(best) == np.array(worst))),
        "same_prompt": sum(count for count in prompts.values() if count > 1),
        "with_margin": sum(row.exchange.margin > 0 for row in rows),
    }


def _tokens(table: EncodedTable) -> dict[str, Any]:
    return {
        "rows": table.rows,
        "tokens": table.tokens,
        "truncated": table.truncated,
        "cut_replies": table.cut_replies,
        "excluded": len(table.excluded),
        "quantiles": list(table.quantiles),
    }


def _asked(fitted: PromptFit) -> dict[str, int]:
    return {
        "whole": fitted.whole,
        "shortened": fitted.shortened,
        "merged": len(fitted.merged),
        "excluded": len(fitted.excluded),
    }


def _listed(kind: Kind, problem: Problem) -> dict[str, Any]:
    return {
        "kind": kind,
        "source": problem.source,
        "line": problem.line,
        "problem": problem.kind,
        "detail": problem.detail,
    }


def _numbered(kind: Kind, rows: Sequence[TextRow], numbers: Sequence[int], problem: str) -> list[dict[str, Any]]:
    return [{"kind": kind, **rows[number].origin, "problem": problem, "detail": ""} for number in numbers]


def _quantiles(values: Sequence[int]) -> list[int]:
    return [int(value) for value in np.quantile(values, QUANTILES, method="nearest")]


def _quantile_names() -> list[str]:
    return ["shortest", "5 %", "half", "95 %", "longest"]


def _places(rows: Sequence[Sequence[Any]]) -> str:
    return ", ".join(str(line) for _, line in rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "\\n") for cell in line) + " |" for line in lines
    )
