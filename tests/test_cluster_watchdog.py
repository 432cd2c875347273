"""What NCCL's watchdog wrote before it ended a rank, in a log that other processes wrote into before."""

from __future__ import annotations

from pathlib import Path

from cluster.watchdog import RankLog

LINE = (
    "[rank0]:[E1129 03:21:49 ProcessGroupNCCL.cpp:688] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
)


def test_only_what_this_process_wrote_counts(tmp_path: Path) -> None:
    path = tmp_path / "policy-0.log"
    path.write_text(f"{LINE}\n")
    log = RankLog.now(str(path))
    assert log.watchdog_line() == ""
    with path.open("a") as file:
        file.write(f"training\n{LINE}\nException raised from checkTimeout\n" + "frame\n" * 100)
    assert log.watchdog_line() == LINE


def test_a_log_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert RankLog.now("").watchdog_line() == ""
    assert RankLog.now(str(tmp_path / "on another machine")).watchdog_line() == ""
