"""Which repository of the hub is meant, and at which commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, as a spec names it."""

    kind: Kind
    id: str
    """`org/name`."""
    revision: str = ""
    """Branch, tag or commit; empty for the default branch."""
    otherwise: str = ""
    """What the spec's text would mean if it were no id, for the errors about a repository that is not there."""

    @property
    def noun(self) -> str:
        return "model" if self.kind == "model" else "data set"

    @property
    def download_command(self) -> str:
        """The hub's own command that fetches the repository into the cache."""
        kind = "" if self.kind == "model" else " --repo-type dataset"
        return f"hf download {self.id}{kind}" + (f" --revision {self.revision}" if self.revision else "")

    @property
    def path(self) -> str:
        """The path of its page on the hub."""
        return self.id if self.kind == "model" else f"datasets/{self.id}"


@dataclass(frozen=True)
class Commit:
    """A repository at one commit, whose files never change."""

    repository: Repository
    sha: str

    @property
    def short(self) -> str:
        return f"{self.repository.id} at {self.sha[:12]}"
