"""Environment variables that ray reads once, when it is imported: import this module before ray.

The token of a private Ray, and which of Ray's own messages a driver does not print.
"""

from __future__ import annotations

import os
import secrets
import sys


def set_private_token() -> None:
    """Make a private Ray require a token that only this process and its workers know.

    Without one, Ray's ports execute the code of anyone who can reach
    them. Nothing changes if RAY_ADDRESS names a cluster, if RAY_AUTH_MODE is
    set, or if Ray was imported already: the processes that it starts would require a token that it does not send.
    """
    if "RAY_ADDRESS" in os.environ or "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def drop_raylet_logs() -> None:
    """Stop Ray from printing the last 20 lines of a lost node manager's log: the run reports the lost node itself."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"^(Raylet is terminated\.|The node with node id: )")


set_private_token()
drop_raylet_logs()
