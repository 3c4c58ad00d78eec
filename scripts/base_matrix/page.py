"""docs/bases.md, from the rows of the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.base_matrix.published import GROUPS, QUICK, SHARDED, TITLES, group_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bases.md"
Row = dict[str, Any]
GOAL = 0.05
DIFFERENCE = 1e-3
ORDER = tuple(GROUPS)

INTRODUCTION = """\
# Bases

Which types of models can be trained, and how. The page is written by `scripts/bases --write`; `scripts/bases TYPE` tries one,
`scripts/bases --quick` the {quick} types that CI tries. transformers {transformers}, torch {torch}, on a CPU in float32.

Encoder-decoders (T5, mT5, BART, mBART) complete prompts in `finetune` ([how](spec.md#bases)); a test of their own
trains, merges and serves them.

A type that is not listed is no less supported: its layout is learned from its transformers class (`orchestrator plan` says what
was found). A row says what was seen of a small model of the type, with as few blocks as show every kind, random weights and a
vocabulary of 256. It is saved as the type is published, and goes through the steps of a job: its layout is read from the folder,
the base is loaded and tested, LoRA and full fine-tuning train every block for {steps} steps, the result is merged, and plain
transformers loads the merged folder.

| column | meaning |
|---|---|
| layout | `table`: described in `anatomy/layouts/`; `class`: learned from the transformers class |
| rows | `packed`: documents share a row; `single`: a document a row, several rows a micro-batch; `one`: a document a \
micro-batch, without padding. `own logits`: the class computes its logits, at every position. Notes below say why |
| attention | `by document`: blocks of a packed row, without a mask; `sdpa`, `eager`: the class's own implementation |
| LoRA, full | loss of the first and the last step |
| served | the merged model, loaded by plain transformers, has the trained model's logits (class logits), `generate` with its \
caches answers the same tokens, and the stored tensors have the base's names, after LoRA and after full fine-tuning |
| nf4 | loss of the first and the third step of LoRA on the quantized base |
| memory | planned / counted memory of a step in bfloat16, at the published width with at least four blocks, {tokens} tokens: \
LoRA on all blocks, full fine-tuning of the last two. Counted are the allocations of a step on tensors without memory |
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page."""
    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    parts = [INTRODUCTION.format(quick=len(QUICK), steps=6, tokens=1024, **versions), _summary(rows)]
    for group in ORDER:
        own = [row for row in rows if group_of(row["type"]) == group]
        parts += [*_group(TITLES[group], own)] if own else []
    parts += _sharded([row for row in rows if row["type"] in SHARDED and "lora" in row])
    parts += [*_listed("Refused", rows, "refused"), *_listed("Fails", rows, "fails")]
    return "\n".join(parts).rstrip() + "\n"


def passed(row: Row) -> bool:
    """Return whether a type was trained, merged and served as it was trained."""
    return (
        "fails" not in row
        and "refused" not in row
        and served(row) == "equal"
        and all(_fell(row[key]) for key in ("lora", "full"))
    )


def served(row: Row) -> str:
    """Return `equal`, or what is not."""
    wrong = list[str]()
    for tune in ("lora", "full"):
        found = row[tune]
        wrong += [f"{tune}: logits differ by {found['difference']:.2g}"] if not found["difference"] <= DIFFERENCE else []
        wrong += [f"{tune}: other tokens"] if not found.get("generates", True) else []
        wrong += [f"{tune}: names {found['names']}"] if found["names"] else []
    return "; ".join(wrong) or "equal"


def way(row: Row) -> str:
    """Return how rows are laid out."""
    ways = row["ways"]
    if group_of(row["type"]) == "encoder":
        return "single" if ways["pads"] else "one"
    layout = "packed" if ways["packs"] else "single" if ways["pads"] else "one"
    return layout if ways["projects"] else f"{layout}, own logits"


def within_goal(row: Row) -> bool | None:
    """Return whether the plan's memory is within the goal; None if it was not counted."""
    figures = [row.get("memory", {}).get(tune) for tune in ("lora", "full")]
    if any(figure is None for figure in figures):
        return None
    return all(abs(figure - 1) <= GOAL for figure in figures)


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return how many types passed, by way, were refused and fail."""
    good = [row for row in rows if passed(row)]
    counted = [row for row in good if within_goal(row) is not None]
    return {
        "types": len(rows),
        "passed": len(good),
        "ways": {name: sum(way(row) == name for row in good) for name in sorted({way(row) for row in good})},
        "learned": sum(row["source"] == "class" for row in good),
        "nf4": sum(_fell(row.get("nf4", {})) for row in good),
        "counted": len(counted),
        "within": sum(bool(within_goal(row)) for row in counted),
        "experts": sum(bool(within_goal(row)) and row["experts"] for row in counted),
        "refused": sum("refused" in row for row in rows),
        "fails": sum(not passed(row) and "refused" not in row for row in rows),
    }


def _summary(rows: Sequence[Row]) -> str:
    found = counts(rows)
    ways = ", ".join(f"{count} {name}" for name, count in found["ways"].items())
    return (
        f"Of {found['types']} types {found['passed']} train, merge and serve as trained ({ways}; {found['learned']} learned from "
        f"the class), {found['refused']} are refused and {found['fails']} fail. nf4 trains {found['nf4']}. The memory of "
        f"{found['within']} of {found['counted']} counted types is planned within 5%, {found['experts']} of them with experts.\n"
    )


def _fell(found: Row) -> bool:
    return "losses" in found and found["losses"][-1] < found["losses"][0]


def _group(title: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| type | example | layout | rows | attention | LoRA | full | served | nf4 | memory |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    reasons: list[str] = []
    for row in rows:
        if "lora" not in row or "full" not in row:
            word = "refused, see below" if "refused" in row else "fails, see below"
            yield f"| {row['type']} | {row['base']} | | {word} | | | | | | |"
            continue
        cells = (
            row["type"],
            row["base"],
            row["source"] + (f", {row['kinds']} kinds" if row["kinds"] > 1 else ""),
            way(row),
            row["ways"]["attention"].replace("_", " "),
            _losses(row["lora"]),
            _losses(row["full"]),
            "fails" if "fails" in row else served(row),
            _losses(row.get("nf4", {})),
            _memory(row.get("memory", {})),
        )
        yield "| " + " | ".join(cells) + " |"
        reasons += [f"* {row['type']}: {why}" for why in _reasons(row)]
    yield ""
    yield from [*reasons, ""] if reasons else []


def _reasons(row: Row) -> Iterator[str]:
    """Yield what was seen of a type that does not allow every way, and what quantizes or is counted otherwise."""
    ways = {"packs": "not packed", "pads": "not padded", "projects": "own logits", "injects": "no stored states"}
    found = {name: why for name, why in row["reasons"].items() if name in ways}
    by_why: dict[str, list[str]] = {}
    for name, why in found.items():
        by_why.setdefault(why, []).append(ways[name])
    said = [f"{', '.join(names)} ({_short(why)})" for why, names in by_why.items()]
    if said:
        yield "; ".join(said)
    for key, name in (("nf4", "nf4"), ("memory", "memory")):
        values = row.get(key, {})
        why = values.get("refused") or values.get("fails") or values.get("costs_note")
        if why:
            yield f"{name}: {_short(why)}"


def _short(text: str) -> str:
    return " ".join(text.split())[:200].replace("|", "/")


def _losses(found: Row) -> str:
    if "losses" in found:
        return " → ".join(f"{loss:.2f}" for loss in found["losses"])
    return "refused" if "refused" in found else "fails" if "fails" in found else ""


def _memory(found: Row) -> str:
    if "lora" in found and "full" in found:
        return f"{found['lora']:.3f}, {found['full']:.3f}"
    return "refused" if "refused" in found else "not counted"


def _sharded(rows: Iterable[Row]) -> Iterator[str]:
    yield "## ZeRO on two ranks\n"
    yield "One type of each kind, LoRA, three steps over two processes; dropout is drawn per rank.\n"
    yield "| type | one process | ZeRO-2 | ZeRO-3 |"
    yield "|---|---|---|---|"
    for row in rows:
        cells = (row["type"], f"{row['lora']['losses'][0]:.2f}", *(_losses(row.get(f"zero{stage}", {})) for stage in (2, 3)))
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _listed(title: str, rows: Iterable[Row], key: str) -> Iterator[str]:
    own = [row for row in rows if key in row]
    if own:
        yield f"## {title}\n"
        yield from [f"* {row['type']} ({row['base']}): {_short(row[key])}" for row in own]
        yield ""
