"""Signals as a request to stop."""

from __future__ import annotations

import os
import signal

import pytest

from patchgd_jax import Interrupted
from patchgd_jax.runs.signals import StopRequest


def test_a_signal_to_a_process_and_its_group_is_one_request(monkeypatch):
    """As `timeout` sends it; one that comes later ends the process."""
    ended = []
    monkeypatch.setattr("patchgd_jax.runs.signals.os._exit", ended.append)
    now = [100.0]
    monkeypatch.setattr("patchgd_jax.runs.signals.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [130, 143]


def test_where_there_is_nothing_to_save_it_ends_at_once():
    with StopRequest() as stop, pytest.raises(Interrupted), stop.immediate():
        os.kill(os.getpid(), signal.SIGINT)
