"""What ray reads from the environment once, when it is imported: so this comes before.

A token for the Ray that a run starts for itself, and which of Ray's own messages a driver does not print.
"""

from __future__ import annotations

import os
import secrets
import sys


def set_private_token() -> None:
    """Have a private Ray ask for a token that only this process and its workers know.

    Ray's ports run anybody's code without one. Nothing changes where RAY_ADDRESS names a cluster, where RAY_AUTH_MODE
    says what is wanted, or where Ray was imported before: the processes it starts would ask for a token that it does
    not show.
    """
    if "RAY_ADDRESS" in os.environ or "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def drop_raylet_logs() -> None:
    """Have Ray print nothing where a node is lost: it prints the last 20 lines of that node manager's log, and the run says what
    happened in words of its own."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"^(Raylet is terminated\.|The node with node id: )")


set_private_token()
drop_raylet_logs()
