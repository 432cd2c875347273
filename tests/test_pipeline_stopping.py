"""A signal is a request at first, and a command the second time."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipeline.stopping import Postponed, StopNow, Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_does_what_it_always_did(number: signal.Signals) -> None:
    heard: list[int] = []
    former = signal.signal(number, lambda n, frame: heard.append(n))
    try:
        with StopRequest() as stop:
            stop.check()
            os.kill(os.getpid(), number)
            assert stop
            assert stop.number == number
            assert heard == []
            with pytest.raises(StopNow):
                stop.check()
            os.kill(os.getpid(), number)
            assert heard == [number]
        os.kill(os.getpid(), number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, former)


def test_what_is_held_is_done_whole() -> None:
    stop = StopRequest()
    stop.number = signal.SIGTERM
    with stop.held():
        stop.check()
        with stop.held():
            stop.check()
        stop.check()
    with pytest.raises(StopNow):
        stop.check()


def test_outside_the_main_thread_it_only_stands_by() -> None:
    def inside() -> None:
        with StopRequest() as stop:
            stop.check()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_says_where_the_run_stands() -> None:
    assert str(Stopped(signal.SIGTERM, 7, 40)) == "stopped by SIGTERM after step 7 of 40, which is committed"


def test_a_postponed_signal_reaches_its_handler_once_it_is_delivered() -> None:
    with Postponed() as signals:
        assert not signals
        signal.raise_signal(signal.SIGINT)
        assert signals
    with pytest.raises(KeyboardInterrupt):
        signals.deliver()
    Postponed().deliver()


def test_a_postponed_signal_that_a_stop_request_takes_note_of_ends_the_wait() -> None:
    with StopRequest() as stop:
        with Postponed() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert not stop
        with pytest.raises(StopNow):
            signals.deliver()
        assert stop.number == signal.SIGTERM
