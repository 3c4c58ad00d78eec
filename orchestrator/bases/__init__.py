"""What `base.model` means: the base that ships with the project, a folder, or a repository of the hub.

base = locate_base(spec.base, spec_folder)     # FolderBase or HubBase; of a hub id the commit is resolved here
base.for_plan()                                # a folder with config.json and the headers of the weights, at least
base.for_data()                                # a folder with the tokenizer, at least
base.for_training(tell)                        # a folder with everything
plan = record_base(plan, base)                 # the plan names the hub id and the commit; located(plan.base) is the base again

An existing path, relative to the spec's file, is a folder; so is a text that begins like a path (`.`, `/`, `~`), and one that has
not the shape of an id. Everything else is the id of a repository on the hub. With `base.add_tokens` it is an EnlargedBase: the
same with rows for these tokens, of which a plan makes only headers, in the cache, and a run the whole, in its folder.
"""

from orchestrator.bases.locate import (
    Base,
    EnlargedBase,
    FolderBase,
    HubBase,
    folder_on_this_node,
    locate_base,
    located,
    record_base,
)

__all__ = [
    "Base",
    "EnlargedBase",
    "FolderBase",
    "HubBase",
    "folder_on_this_node",
    "locate_base",
    "located",
    "record_base",
]
