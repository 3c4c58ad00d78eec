"""A signal that asks for an end is answered at once, ends what runs as the keyboard does, and is ignored where it was."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WORKING = """
import signal, sys, time
from orchestrator.store.signals import handle_stop_signals, stopped_by
if len(sys.argv) > 1:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
handle_stop_signals()
try:
    print("ready", flush=True)
    time.sleep(30 if len(sys.argv) == 1 else 0.5)
except KeyboardInterrupt:
    print("in order", flush=True)
    sys.exit(128 + stopped_by())
sys.exit(0)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_in_order_and_says_how_to_go_on(number: signal.Signals, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "in order\n")
    assert said == f"stopped by {number.name}; submit the same spec again to continue from what is on disk\n"


def test_what_nohup_ignores_stays_ignored() -> None:
    with subprocess.Popen([sys.executable, "-c", WORKING, "nohup"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
