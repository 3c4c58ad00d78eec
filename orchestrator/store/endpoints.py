"""Check within seconds, and without Ray, that a Ray cluster answers at an address.

Ray itself retries for a quarter of an hour to connect to a cluster that is gone.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from dataclasses import dataclass

CONNECT_S = 8.0
"""Time allowed to resolve and connect to a host, and again to receive its first bytes."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of an HTTP/2 client (gRPC is one): RFC 9113, section 3.4, with an empty SETTINGS frame."""
SETTINGS = 4
"""Type of the frame that an HTTP/2 server answers first."""
DEFAULT_REMEDY = (
    "check that the cluster is up (`ray status` on its head) and that this is the address of its head, HOST:6379 unless it "
    "was started with another --port; unset RAY_ADDRESS, or leave --address out, to run on this machine alone"
)


@dataclass(frozen=True)
class Unreachable:
    """Reason why no Ray cluster can be reached at an address, and the remedy."""

    reason: str
    remedy: str = DEFAULT_REMEDY
    is_refused: bool = False
    """True if nothing listens there, as opposed to a slow answer."""


def unreachable(address: str, timeout_s: float = CONNECT_S) -> Unreachable | None:
    """Return why no Ray cluster answers at `address`; None if one does, or if only Ray can find out (`auto`, `local`).

    Takes at most three times `timeout_s`.
    """
    if address in ("auto", "local"):
        return None
    if address.startswith("ray://"):
        return Unreachable(
            "this is an address of Ray Client, under which a run would not see its own files",
            "run on a node of the cluster with --address HOST:6379, or submit: ray job submit --address http://HOST:8265 "
            "--working-dir . -- python -m jobs.sweep SPEC",
        )
    if re.match(r"https?://", address):
        return Unreachable(
            "this is the address of Ray's dashboard, which takes jobs",
            f"submit: ray job submit --address {address} --working-dir . -- python -m jobs.sweep SPEC; or give HOST:6379",
        )
    found = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^\s:\[\]]+)):(\d{1,5})", address)
    if found is None or not 0 < int(found[3]) < 65536:
        return Unreachable("this is not a host and a port", "give HOST:PORT, for instance 10.0.0.1:6379, or `auto`")
    host, port = found[1] or found[2], int(found[3])
    known = _resolve(host, port, timeout_s)
    return known if isinstance(known, Unreachable) else _greet(known, timeout_s)


_Place = tuple[socket.AddressFamily, tuple[object, ...]]


def _resolve(host: str, port: int, timeout_s: float) -> _Place | Unreachable:
    """Resolve a host name in a thread, since the resolver has no timeout that can be set."""
    answer: list[_Place | Unreachable] = []

    def look_up() -> None:
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            answer.append((family, place))
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            answer.append(Unreachable(f"the host {host!r} cannot be resolved: {said}"))

    # A daemon thread, so that a resolver that never returns does not keep the process alive.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else Unreachable(f"the host {host!r} could not be resolved within {timeout_s:g} s")


def _greet(place: _Place, timeout_s: float) -> Unreachable | None:
    family, where = place
    try:
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_s)
            link.connect(where)
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return None  # the greeting would have to be encrypted
            try:
                link.sendall(PREFACE)
                first = link.recv(9)
            except TimeoutError:
                return Unreachable(f"the port accepts connections, but nothing answered within {timeout_s:g} s")
            except OSError:
                first = b""
    except TimeoutError:
        return Unreachable(f"no connection within {timeout_s:g} s")
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        return Unreachable(f"no connection: {error.strerror or error}", is_refused=refused)
    # An HTTP/2 frame header has 9 bytes; the fourth is the frame's type.
    if len(first) == 9 and first[3] == SETTINGS:
        return None
    return Unreachable("something answers there that is not Ray's control store (GCS)")
