"""Which base the spec means, and the folders that have of it what a step needs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from orchestrator.anatomy import ModelAnatomy, read_anatomy, resolve_base
from orchestrator.bases.added_tokens import is_made_from, made_from, with_added_tokens
from orchestrator.bases.files import is_complete, needed_files, side_files, weight_files
from orchestrator.bases.headers import headers_folder
from orchestrator.bases.own_code import require_pin, use_pinned_code
from orchestrator.errors import BaseError
from orchestrator.hub import Commit, Repository, fetch_files, list_files, resolve_commit, snapshot_folder
from orchestrator.hub.errors import not_cached
from orchestrator.plan.values import RunPlan
from orchestrator.spec.hub_ids import is_repository_id
from orchestrator.spec.models import BaseSpec, Task
from orchestrator.store.machine import cache_folder
from orchestrator.units import format_bytes
from orchestrator.work.execution import BaseLoad

Tell = Callable[[str], None]
Plan = TypeVar("Plan", bound=RunPlan)


@dataclass(frozen=True)
class FolderBase:
    """The base that ships with the project, or a local folder."""

    folder: Path

    hub: None = None
    commit: None = None

    @property
    def cached(self) -> Path | None:
        return self.folder

    def for_plan(self) -> Path:
        return self.folder

    def for_data(self) -> Path:
        return self.folder

    def for_training(self, tell: Tell) -> Path:
        return self.folder

    def anatomy(self, task: Task = "completion") -> ModelAnatomy:
        """Read the anatomy as far as a plan needs it."""
        return read_anatomy(self.folder, need_weights=False, task=task)

    @property
    def origin(self) -> dict[str, Any]:
        """What `BaseLoad` records of it beyond the folder."""
        return {}


@dataclass(frozen=True)
class HubBase:
    """A repository of the hub at one commit."""

    hub: Commit

    @property
    def commit(self) -> Commit:
        """The commit that a run records, so that it is resumed from the same."""
        return self.hub

    @property
    def cached(self) -> Path | None:
        """The snapshot's folder on this machine, if it has the config and all weights."""
        folder = snapshot_folder(self.hub)
        return folder if is_complete(folder) else None

    @property
    def origin(self) -> dict[str, Any]:
        """What `BaseLoad` records of it beyond the folder."""
        return {"hub_id": self.hub.repository.id, "revision": self.hub.sha}

    def anatomy(self, task: Task = "completion") -> ModelAnatomy:
        """Read the anatomy as far as a plan needs it."""
        return read_anatomy(self.for_plan(), need_weights=False, task=task)

    def for_plan(self) -> Path:
        """Return a folder with config.json and at least the headers of the weights; fetches no weights."""
        return self.cached or headers_folder(self.hub)

    def for_data(self) -> Path:
        """Return the snapshot's folder with the tokenizer and the other small files; fetches no weights."""
        sizes, folder = self._sizes(), snapshot_folder(self.hub)
        if sizes is None:
            return folder
        names = side_files(sizes)
        try:
            return fetch_files(self.hub, names)
        except BaseError:
            # A cache that transformers filled has no licence and no card.
            if not all((folder / name).is_file() for name in needed_files(names)):
                raise
            return folder

    def for_training(self, tell: Tell) -> Path:
        """Return the snapshot's folder with everything that a run needs.

        Args:
            tell: Receives a line before something large is fetched.

        Raises:
            BaseError: it cannot be fetched.
        """
        folder, sizes = snapshot_folder(self.hub), self._sizes()
        if sizes is None:
            if self.cached is None:
                raise not_cached(self.hub.repository, "the hub cannot be asked", "a part of the weights is")
            return folder
        weights = weight_files(self.hub, sizes, self.for_data())
        num_bytes = sum(sizes[name] for name in weights if not (folder / name).is_file())
        if num_bytes:
            tell(f"fetching {self.hub.short} from the hub: {format_bytes(num_bytes)} of weights")
        return fetch_files(self.hub, weights)

    def _sizes(self) -> dict[str, int] | None:
        """Return the size of every file; None if the hub cannot be asked and its cache must do."""
        try:
            return list_files(self.hub)
        except BaseError:
            if not (snapshot_folder(self.hub) / "config.json").is_file():
                raise
            return None


@dataclass(frozen=True)
class EnlargedBase:
    """A base with the tokens that a spec adds to it."""

    original: FolderBase | HubBase
    tokens: tuple[str, ...]
    folder: Path
    """Folder of the enlarged base, in the run's folder."""

    hub: None = None

    @property
    def commit(self) -> Commit | None:
        return self.original.commit

    @property
    def cached(self) -> Path | None:
        return self.original.cached

    @property
    def origin(self) -> dict[str, Any]:
        """What `BaseLoad` records of it beyond the folder."""
        return {}

    def anatomy(self, task: Task = "completion") -> ModelAnatomy:
        """Read the anatomy as far as a plan needs it."""
        return read_anatomy(self.for_plan(), need_weights=False, task=task)

    def for_plan(self) -> Path:
        """Return a folder with config.json and at least the headers of the weights: the run's if it was made from this base
        and these tokens."""
        return self._made("plan")

    def _made(self, step: Literal["plan", "data"]) -> Path:
        source = self.original.for_plan()
        origin = made_from(source, self.tokens)
        if is_made_from(self.folder, origin):
            return self.folder
        target = cache_folder() / "enlarged" / f"{origin[:16]}-{step}"
        return with_added_tokens(source, self.original.for_data(), self.tokens, target, step=step)

    def for_data(self) -> Path:
        """Return a folder with the tokenizer too."""
        return self._made("data")

    def for_training(self, tell: Tell) -> Path:
        """Return the enlarged base's folder with everything that a run needs; made in the run's folder if it is not there."""
        source = self.original.for_training(tell)
        return with_added_tokens(source, source, self.tokens, self.folder)


Base = FolderBase | HubBase | EnlargedBase


def locate_base(base: BaseSpec, folder: Path, commit: str = "", run_folder: Path | None = None) -> Base:
    """Return the base that a spec means. A hub id is resolved to its commit here.

    Args:
        folder: The spec's, to which paths are relative.
        run_folder: The run's, where a base with added tokens is made; None to plan only.
        commit: Of an earlier submission of the same run, which used this commit of the hub's repository.

    Raises:
        BaseError: there is no such folder; or a repository that is missing, gated, not reachable and not cached.
    """
    original = _locate(base, folder, commit)
    if not base.add_tokens:
        return original
    return EnlargedBase(original, base.add_tokens, (run_folder or cache_folder() / "enlarged") / "base")


def _locate(base: BaseSpec, folder: Path, commit: str) -> FolderBase | HubBase:
    if not _is_hub_id(base.model, folder):
        found = resolve_base(base.model, folder)
        if not found.exists():
            raise _no_folder(base.model, found)
        use_pinned_code(base, found, pinned_by_commit=False)
        return FolderBase(found)
    require_pin(base)
    otherwise = f"a folder; {_nearby(resolve_base(base.model, folder))}"
    on_hub = HubBase(resolve_commit(Repository("model", base.model, commit or base.revision or "", otherwise)))
    if base.trust_remote_code:
        use_pinned_code(base, on_hub.for_data(), pinned_by_commit=True)
    return on_hub


def _is_hub_id(model: str, folder: Path) -> bool:
    if model == "sample" or model.startswith((".", "/", "~")) or resolve_base(model, folder).exists():
        return False
    return is_repository_id(model)


def _no_folder(model: str, path: Path) -> BaseError:
    return BaseError(
        "there is no such folder",
        where=str(path),
        expected="a folder with config.json and safetensors weights; or the id of a model on the hub, org/name, "
        f"which {model!r} is not",
        remedy=f"fix `base.model`: {_nearby(path)}",
    )


def _nearby(path: Path) -> str:
    """Return that the folder is missing, and what lies near."""
    parent = path.parent
    if not parent.is_dir():
        return f"there is no folder {path}, and no {parent} either"
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"there is no folder {path}" + (f"; did you mean {' or '.join(str(parent / name) for name in near)}?" if near else "")


def located(load: BaseLoad) -> Base:
    """Return the base that a plan recorded."""
    if load.hub_id:
        return HubBase(Commit(Repository("model", load.hub_id, load.revision or ""), load.revision or ""))
    return FolderBase(Path(load.folder))


def record_base(plan: Plan, base: Base) -> Plan:
    """Return the plan with the hub's id and commit of its base."""
    return plan.model_copy(update={"base": plan.base.model_copy(update=base.origin)}) if base.origin else plan


def folder_on_this_node(load: BaseLoad) -> Path:
    """Return the folder from which this node loads a base: its own cache of the hub if that has it, else the driver's folder."""
    base = located(load)
    own = base.cached
    return own if own is not None else Path(load.folder)
