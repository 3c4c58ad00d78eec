"""What the hub's client raises, told as this project's errors: what, where, expected, remedy.

The client's own texts are not shown: they have URLs with signatures in them, and advice for programmers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import BaseError, DataError, OrchestratorError
from orchestrator.hub.repository import Repository

CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet", "datasets")
"""Packages whose exceptions are told; any other exception, if it is not one of the system or of a value, is a mistake of ours."""


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Raise what the hub's client raises in the block as a BaseError, for a data set as a DataError."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        known = isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.split(".")[0] in CLIENTS
        if not known:
            raise
        told = _explain(error, repository)
        # Without the cause: its text may have a signed URL in it.
        raise told from None


def hub_error(repository: Repository, what: str, *, expected: str = "", remedy: str) -> OrchestratorError:
    """Return the error about a repository, of the class that fits its kind."""
    kind = BaseError if repository.kind == "model" else DataError
    return kind(what, where=f"{repository.id} on {endpoint()}", expected=expected, remedy=remedy)


def endpoint() -> str:
    """Return the hub's address (HF_ENDPOINT), without a user name or password in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def hub_cache() -> str:
    """Return the folder of the hub's cache on this machine (HF_HUB_CACHE, or `hub` in HF_HOME)."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class _Failure:
    """An exception of the client's, with what several explanations need."""

    error: BaseException
    repository: Repository

    @property
    def headers(self) -> dict[str, str]:
        response: Any = getattr(self.error, "response", None)
        return {str(key).lower(): str(value) for key, value in dict(getattr(response, "headers", {})).items()}


def _explain(error: BaseException, repository: Repository) -> OrchestratorError:
    """Return the error for the first exception in the chain of causes that says what happened."""
    chain = list(_chain(error))
    for rows, links in ((EXPLANATIONS, chain), (LAST, chain[::-1])):
        for link in links:
            if (tell := _explanation(link, rows)) is not None:
                return tell(_Failure(link, repository))
    return hub_error(
        repository,
        f"the hub's client failed ({type(error).__name__})",
        remedy=f"see what `{repository.download_command}` says; with it in the cache this is not needed",
    )


def is_told(error: BaseException) -> bool:
    """Return whether an exception or one of its causes is the hub's or the network's."""
    return any(_explanation(link, EXPLANATIONS) is not None for link in _chain(error))


def _explanation(link: BaseException, rows: Sequence[Explanation]) -> Callable[[_Failure], OrchestratorError] | None:
    names = {kind.__name__ for kind in type(link).__mro__}
    status = getattr(getattr(link, "response", None), "status_code", None)
    return next((tell for name, code, tell in rows if name in names and code in (None, status)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def token_source() -> str:
    """Return where the client's token comes from; empty if there is none. The token itself is never shown."""
    from huggingface_hub import constants, get_token

    if not get_token():
        return ""
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    return name or f"the token file {constants.HF_TOKEN_PATH}"


def _missing(failure: _Failure) -> OrchestratorError:
    repository, source = failure.repository, token_source()
    reader = f"the token of {source} may not read it" if source else "it is private, and there is no token"
    # The hub answers alike for a repository that is missing and for one that the reader may not see.
    return hub_error(
        repository,
        f"the hub has no {repository.noun} of this id, or {reader}",
        expected=_id_or(repository),
        remedy=f"check the id; for a private one run `hf auth login` or set HF_TOKEN, and try `{repository.download_command}`",
    )


def _id_or(repository: Repository) -> str:
    return f"the id of a {repository.noun}, org/name" + (f"; or {repository.otherwise}" if repository.otherwise else "")


def _gated(failure: _Failure) -> OrchestratorError:
    repository, source = failure.repository, token_source()
    state = f"the account of {source} has not been granted access" if source else "there is no token"
    login = "" if source else ", run `hf auth login` or set HF_TOKEN"
    return hub_error(
        repository,
        f"the repository is gated, and {state}",
        expected="an account that has accepted its terms",
        remedy=f"accept the terms at {endpoint()}/{repository.path}{login}, and try `{repository.download_command}`",
    )


def _unauthorised(failure: _Failure) -> OrchestratorError:
    repository, source = failure.repository, token_source()
    return hub_error(
        repository,
        f"the hub rejects the token of {source} (401)" if source else "the hub asks for a token (401)",
        expected="a valid token, in HF_TOKEN or in the file that `hf auth login` writes",
        remedy=f"run `hf auth login`, or set HF_TOKEN to another token, and try `{repository.download_command}`",
    )


def _forbidden(failure: _Failure) -> OrchestratorError:
    repository, source = failure.repository, token_source()
    return hub_error(
        repository,
        f"the token of {source} may not read this (403)" if source else "the hub refuses access without a token (403)",
        expected="a token with the permission to read this repository",
        remedy=f"use a token with that permission (HF_TOKEN or `hf auth login`), and try `{repository.download_command}`",
    )


def _no_revision(failure: _Failure) -> OrchestratorError:
    repository = failure.repository
    key = "`base.revision`" if repository.kind == "model" else "the revision after @"
    return hub_error(
        repository,
        f"the repository has no revision {repository.revision or 'main'}",
        expected="a branch, a tag or a commit of it",
        remedy=f"fix {key}; {endpoint()}/{repository.path}/commits/main lists the commits",
    )


def _no_file(failure: _Failure) -> OrchestratorError:
    return hub_error(
        failure.repository,
        "a file that the repository lists is not there",
        remedy=f"try again later, or see what `{failure.repository.download_command}` says",
    )


def _disabled(failure: _Failure) -> OrchestratorError:
    return hub_error(failure.repository, "the hub has disabled access to this repository", remedy="use another one")


def _rate_limited(failure: _Failure) -> OrchestratorError:
    repository, seconds = failure.repository, failure.headers.get("retry-after", "")
    wait = f"wait {seconds} s" if seconds.isdigit() else "wait some minutes"
    more = "" if token_source() else ", or set HF_TOKEN: the limit is higher with a token"
    return hub_error(
        repository,
        "the hub limits the rate of requests (429)",
        remedy=f"{wait} and submit again{more}; with `{repository.download_command}` beforehand nothing is requested",
    )


def _server_error(failure: _Failure) -> OrchestratorError:
    status = getattr(getattr(failure.error, "response", None), "status_code", "an unexpected one")
    return hub_error(
        failure.repository,
        f"the hub answers with status {status}",
        remedy=f"submit again later; files that are complete are kept. `{failure.repository.download_command}` fetches them too",
    )


def _offline(failure: _Failure) -> OrchestratorError:
    from huggingface_hub import constants

    return not_cached(failure.repository, "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached")


def not_cached(repository: Repository, why: str, missing: str = "") -> OrchestratorError:
    """Return the error for files that are neither in the cache nor may or can be fetched.

    Args:
        why: Why they cannot be fetched.
        missing: What is missing; by default the whole repository.
    """
    return hub_error(
        repository,
        f"{missing or f'the {repository.noun} is'} not in the hub's cache ({hub_cache()}), and {why}",
        expected=_id_or(repository) if not missing else "",
        remedy=f"run `{repository.download_command}` where the hub can be reached, with the same HF_HOME or HF_HUB_CACHE",
    )


def _unreachable(failure: _Failure) -> OrchestratorError:
    repository = failure.repository
    return hub_error(
        repository,
        f"the hub cannot be reached ({type(failure.error).__name__}), and not everything is in its cache",
        expected=_id_or(repository),
        remedy=f"check the network, HF_ENDPOINT and proxies, and submit again: files that are complete are kept; "
        f"or run `{repository.download_command}` where the hub can be reached",
    )


def _cut(failure: _Failure) -> OrchestratorError:
    return hub_error(
        failure.repository,
        f"the connection to the hub was cut again and again ({type(failure.error).__name__})",
        remedy=f"submit again: files that are complete are kept; or run `{failure.repository.download_command}` first",
    )


def _system(failure: _Failure) -> OrchestratorError:
    number = failure.error.errno if isinstance(failure.error, OSError) else None
    if number is None:  # the client found a file of another size than the hub says
        return _cut(failure)
    more = "free space there, or " if number in (errno.ENOSPC, errno.EDQUOT) else ""
    return hub_error(
        failure.repository,
        f"the hub's cache cannot be written: {os.strerror(number)} ({hub_cache()})",
        remedy=f"{more}set HF_HOME or HF_HUB_CACHE to a writable folder with free space",
    )


Explanation = tuple[str, int | None, Callable[[_Failure], OrchestratorError]]
"""Class of the client's exception or of one that it inherits from, HTTP status (None: any), and what it is told as.

By names, since the client has changed the library of its transport exceptions, and importing it takes time."""
EXPLANATIONS: tuple[Explanation, ...] = (
    ("GatedRepoError", None, _gated),
    ("RevisionNotFoundError", None, _no_revision),
    ("RepositoryNotFoundError", None, _missing),
    ("RemoteEntryNotFoundError", None, _no_file),
    ("DisabledRepoError", None, _disabled),
    ("HfHubHTTPError", 401, _unauthorised),
    ("HfHubHTTPError", 403, _forbidden),
    ("HfHubHTTPError", 404, _missing),
    ("HfHubHTTPError", 429, _rate_limited),
    ("HfHubHTTPError", None, _server_error),
    ("OfflineModeIsEnabled", None, _offline),
    ("RemoteProtocolError", None, _cut),
    ("ReadError", None, _cut),
    ("TransportError", None, _unreachable),
)
"""The first that fits the first exception in the chain of causes that any of them fits."""
LAST: tuple[Explanation, ...] = (
    ("DatasetNotFoundError", None, _missing),
    ("LocalEntryNotFoundError", None, _offline),
    ("RevisionResolutionError", None, _offline),
    ("OSError", None, _system),
)
"""What the client raises instead of a cause says less than the cause; these are tried afterwards, on the last cause first."""
