"""`raylign ledger`: what became of every sample of a run, as of its newest commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.storage import Folder
from pipeline.config.loop_config import LoopConfig
from pipeline.folder.run_folder import RunStart, read_history
from pipeline.loop.commits import DriverState, newest_commit
from pipeline.observe.observer import read_metrics
from pipeline.samples.ledger import Ledger

SHOWN = 10  # quarantined samples that are named one by one


def show_account(run_dir: Path, config: LoopConfig, console: Console) -> None:
    """Print the account of the newest commit, the starts of the run, and what has happened since.

    Raises ValueError when the folder holds no run.
    """
    history = read_history(run_dir)
    commit = newest_commit(Folder(run_dir / "checkpoints"), history)
    state = commit.state if commit else DriverState(kl_coef=0)
    ledger = Ledger.of(config.batch.group_size, state.ledger)
    account = ledger.account()
    console.print(Text(f"samples after {state.step} of {config.steps} committed steps"))
    table = Table()
    for column, justify in (("", "left"), ("samples", "right"), ("share", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, count in (
        ("issued", account.issued),
        ("trained", account.trained),
        ("filtered", account.filtered),
        ("quarantined", account.quarantined),
        ("in flight", account.in_flight),
    ):
        table.add_row(name, f"{count:,}", f"{count / account.issued:.1%}" if account.issued else "-")
    table.add_section()
    table.add_row("re-issued", f"{state.ledger.reissued:,}", "")
    console.print(table)
    balance = f"{account.trained:,} + {account.filtered:,} + {account.quarantined:,} + {account.in_flight:,}"
    lines = [f"issued {account.issued:,} = {balance}: {'balances' if account.balances else 'DOES NOT BALANCE'}"]
    lines.append(f"every sample below {ledger.watermark:,} has ended")
    if waiting := sum(chunk.samples for chunk in ledger.open.values() if chunk.step >= config.steps):
        lines.append(f"{waiting:,} are of steps after the last one, and are generated if the run is made longer")
    lines += [*_filtered(state.ledger.filtered), *_reasons(state.ledger.quarantined)]
    done = len(read_metrics(run_dir))
    if done > state.step:
        lines.append(f"steps {state.step} to {done - 1} are done but not committed: they would be done again")
    for line in (*lines, *map(_told, history)):
        console.print(Text(line), soft_wrap=True)


def _filtered(reasons: Mapping[str, int]) -> list[str]:
    return [f"filtered {count:,}: {reason}" for reason, count in sorted(reasons.items())]


def _reasons(quarantined: Mapping[int, str]) -> list[str]:
    lines = [f"quarantined {count}: {reason}" for reason, count in Counter(quarantined.values()).most_common(SHOWN)]
    named = ", ".join(str(sample) for sample in list(quarantined)[:SHOWN])
    return [*lines, f"quarantined samples: {named}{' ...' if len(quarantined) > SHOWN else ''}"] if lines else []


def _told(epoch: RunStart) -> str:
    return f"epoch {epoch.number}: from step {epoch.from_step}, {epoch.started}, process {epoch.pid} on {epoch.host}"
