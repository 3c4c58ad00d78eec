"""A token for the Ray that a run starts for itself. Imported before ray: ray reads its authentication mode once."""

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


set_private_token()
