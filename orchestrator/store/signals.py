"""Handle termination signals like Ctrl-C: clean up, print what to do, exit with a distinct code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


def handle_stop_signals() -> None:
    """Have SIGTERM (`ray job stop`, `kill`, a batch system) and SIGHUP (a terminal that is closed) raise KeyboardInterrupt.

    What to do is said at once, for `ray job stop` follows with SIGKILL after three seconds. A second signal ends the process.
    Nothing changes outside the main thread, nor where a signal is ignored (`nohup`).
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    for each in SIGNALS:
        # A second signal ends the process at once, in case cleaning up hangs.
        signal.signal(each, signal.SIG_DFL)
    said = f"stopped by {signal.Signals(number).name}; submit the same spec again to continue from what is on disk\n"
    with contextlib.suppress(OSError):  # the reader of stderr may be gone
        # os.write is safe in a signal handler; print could deadlock on the stream's lock.
        os.write(2, said.encode())
    raise KeyboardInterrupt


def stopped_by() -> int | None:
    """Return the signal that ended the process, if any: Ray raises a KeyboardInterrupt of its own that does not carry it."""
    return _received[-1] if _received else None
