"""Ids of repositories on the Hugging Face hub, as a spec writes them: `base.model: org/name`, `data.train: hub:org/name`."""

from __future__ import annotations

import re
from dataclasses import dataclass

REPOSITORY_ID = re.compile(r"(?!.*(?:--|\.\.))(?:\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
"""`name` or `org/name`, by the rule of `huggingface_hub.utils.validate_repo_id`."""
HUB = "hub:"
DATA = re.compile(r"hub:(?P<id>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^/:]*)(?:/(?P<split>[^/:]+))?)?")
DATA_SHAPE = "hub:org/name, hub:org/name@revision, hub:org/name:config or hub:org/name:config/split"


def is_repository_id(text: str) -> bool:
    """Return whether the text has the shape of a repository's id."""
    return REPOSITORY_ID.fullmatch(text) is not None and not text.endswith(".git")


@dataclass(frozen=True)
class HubData:
    """A data set of the hub as the spec names it; an empty part was not given."""

    id: str
    revision: str = ""
    config: str = ""
    split: str = ""


def parse_hub_data(path: str) -> HubData | None:
    """Read `hub:org/name[@revision][:config[/split]]`; None if it has another shape.

    The config may be left out before a split: `hub:org/name:/train`.
    """
    found = DATA.fullmatch(path)
    if found is None or not is_repository_id(found["id"]):
        return None
    return HubData(found["id"], found["revision"] or "", found["config"] or "", found["split"] or "")
