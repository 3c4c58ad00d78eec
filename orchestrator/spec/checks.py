"""Checks of the whole spec: keys that are valid one by one but not together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import SelectionError
from orchestrator.spec.adapters import ADAPTER_KINDS, AdapterName
from orchestrator.spec.hub_ids import DATA_SHAPE, HUB, is_repository_id, parse_hub_data
from orchestrator.spec.messages import is_number, near_names
from orchestrator.spec.models import (
    ADAPTER_KEYS,
    Anchor,
    AnchorSpec,
    ColumnsSpec,
    FinetuneSpec,
    JobSpec,
    SearchPoint,
    SearchSpec,
    Tune,
)
from orchestrator.spec.policy import parse_policy
from orchestrator.spec.source import KeyPath, spell_path
from orchestrator.spec.tasks import METRICS, RETENTION_TASKS, TASKS
from orchestrator.spec.unsupported import UNSUPPORTED, policies_of

TEMPLATE_COLUMN = re.compile(r"(?<!\{)\{[^{}]+\}")
FUNCTION = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")


@dataclass(frozen=True)
class Finding:
    """A mistake, its place, and the places on which the judgement depends (none of which may itself be invalid)."""

    path: KeyPath
    message: str
    hint: str = ""
    needs: tuple[KeyPath, ...] = ()


def find_mistakes(spec: JobSpec, folder: Path) -> Iterator[Finding]:
    """Yield the findings of all checks. `folder` is the base of the spec's relative paths."""
    for check in CHECKS:
        yield from check(spec)
    for row in UNSUPPORTED:
        for path, value in row.find(spec, folder):
            yield Finding(path, f"{row.verdict}: {row.title}; found {value!r}", row.remedy)
    yield from _misspelt_sample(spec, folder)


def _misspelt_sample(spec: JobSpec, folder: Path) -> Iterator[Finding]:
    """`smaple` would be looked for on the hub, where models without an organisation have such names."""
    model = spec.base.model
    if model != "sample" and is_repository_id(model) and near_names(model, ["sample"]) and not (folder / model).exists():
        yield Finding(("base", "model"), f"there is no folder {model!r}", "did you mean sample?")


def _step_size(spec: JobSpec) -> Iterator[Finding]:
    longest, step = spec.data.max_tokens, spec.train.tokens_per_step
    if step != "auto" and longest > step:
        written = "max_tokens" in spec.data.model_fields_set
        path = ("data", "max_tokens") if written else ("train", "tokens_per_step")
        yield Finding(
            path,
            f"data.max_tokens ({longest}) is more than train.tokens_per_step ({step}); a step must hold the longest document",
            f"lower data.max_tokens to {step} or raise train.tokens_per_step to {longest}",
            needs=(("data", "max_tokens"), ("train", "tokens_per_step")),
        )


def _ranges(spec: JobSpec) -> Iterator[Finding]:
    if spec.search is None:
        return
    for tune in ("lora", "full"):
        pair = spec.search.learning_rate.lora if tune == "lora" else spec.search.learning_rate.full
        if pair is not None and pair[0] > pair[1]:
            path = ("search", "learning_rate", tune)
            yield Finding(
                path, f"the range is reversed: {pair[0]:g} to {pair[1]:g}", f"write [{pair[1]:g}, {pair[0]:g}]", (path,)
            )


def _shares(spec: JobSpec) -> Iterator[Finding]:
    held_out = [value for value in (spec.data.eval, spec.data.test) if isinstance(value, float)]
    if sum(held_out) >= 1.0:
        path = ("data", "eval") if "eval" in spec.data.model_fields_set else ("data", "test")
        yield Finding(
            path,
            f"eval and test take {sum(held_out):g} of the rows; nothing is left to train on",
            "let the shares add up to less than 1",
            needs=(("data", "eval"), ("data", "test")),
        )


def _columns(spec: JobSpec) -> Iterator[Finding]:
    used = spec.traits.columns
    read = {*used, *spec.traits.optional_columns}
    if spec.data.retain is not None:
        read |= {column for task in RETENTION_TASKS for column in TASKS[task].columns}
    roles: dict[str, str] = {}
    for role, default in ColumnsSpec().model_dump().items():
        path, column = ("data", "columns", role), getattr(spec.data.columns, role)
        if not column.strip():
            yield Finding(path, "the column's name is empty")
        elif column != default and role not in read:
            yield Finding(path, f"task {spec.task} does not use this column", f"it reads {' and '.join(used)}", (("task",), path))
    for role in used:
        column = getattr(spec.data.columns, role)
        if column in roles:
            path = ("data", "columns", role)
            yield Finding(path, f"{column!r} is already the column of {roles[column]}", "", (("task",), ("data", "columns")))
        roles[column] = role


def _format(spec: JobSpec) -> Iterator[Finding]:
    data, path = spec.data, ("data", "format")
    fitting = spec.traits.formats
    if data.format not in ("auto", *fitting):
        hint = f"fitting: {' | '.join(('auto', *fitting))}"
        yield Finding(path, f"rows of format {data.format} do not fit task {spec.task}", hint, needs=(("task",), path))
    if data.template_without_input is not None and not spec.traits.fills_alpaca_templates:
        path = ("data", "template_without_input")
        yield Finding(path, f"task {spec.task} does not use Alpaca prompts", "remove it", needs=(("task",), path))
    for key in ("template", "template_without_input"):
        text = getattr(data, key)
        if text is not None and not TEMPLATE_COLUMN.search(text):
            yield Finding(("data", key), "the template names no column", "write {name} where a column's text belongs")
    if data.delimiter is not None and data.delimiter in '"\r\n':
        yield Finding(("data", "delimiter"), f"{data.delimiter!r} cannot be a delimiter", 'for example ";"')


def _classifier(spec: JobSpec) -> Iterator[Finding]:
    if spec.classify is not None and not spec.traits.head.is_new:
        yield Finding(("classify",), f"task {spec.task} has no classifier", "remove it, or write task: classify", (("task",),))


def _metric(spec: JobSpec) -> Iterator[Finding]:
    if spec.search is None:
        return
    metric, path = spec.search.metric, ("search", "metric")
    fitting = spec.traits.metrics
    if metric in METRICS:
        if metric not in fitting:
            yield Finding(path, f"{metric} does not fit task {spec.task}", f"fitting: {' | '.join(fitting)}", (("task",), path))
    elif FUNCTION.match(metric) is None:
        near = near_names(metric, METRICS)
        hint = f"did you mean {near[0]}?" if near else ""
        yield Finding(path, f"{metric!r} is not a metric; expected {' | '.join(METRICS)} | package.module:function", hint)


def _policies(spec: JobSpec) -> Iterator[Finding]:
    for path, text in policies_of(spec):
        try:
            policy = parse_policy(text)
        except SelectionError as error:
            yield Finding(path, f"{error.what}; expected {error.expected}", error.remedy)
            continue
        if policy.kind == "none":
            hint = "remove it" if path[0] == "search" else "write for example last:2"
            yield Finding(path, "`none` trains nothing; as a control it always runs", hint)
        if policy.kind == "top" and path[0] == "search" and spec.search is not None and not spec.search.probe:
            message = f"{text} chooses blocks by their scores, but search.probe: false turns scoring off"
            yield Finding(path, message, "remove search.probe, or name blocks", needs=(("search", "probe"), path))


def _points(spec: JobSpec) -> Iterator[Finding]:
    """Find search settings that would be ignored because the search has a fixed list of points."""
    search = spec.search
    if search is None or (search.algorithm != "fixed" and not search.points):
        return
    path = ("search", "points")
    needs = (("search", "algorithm"), path)
    if search.algorithm != "fixed":
        hint = "write algorithm: fixed, or remove the points"
        yield Finding(path, f"algorithm {search.algorithm} proposes its own trials and reads no points", hint, needs)
        return
    if not search.points:
        hint = "write points: [{layers: last:2, learning_rate: 1.0e-3}]"
        yield Finding(("search", "algorithm"), "algorithm fixed has no points to try", hint, needs)
    own = {"layers", "tune", "lora_rank", *ADAPTER_KEYS, "replay", "anchor", "layer_decay"}
    for name, default in SearchSpec().model_dump(include=own).items():
        if getattr(search, name) != default:
            hint = f"remove it; every point has its own {name}"
            yield Finding(("search", name), "algorithm fixed tries only its points", hint, needs)
    for number, point in enumerate(search.points):
        for name in ("lora_rank", *ADAPTER_KEYS) if point.tune == "full" else ():
            if getattr(point, name) != SearchPoint.model_fields[name].default:
                yield Finding(
                    (*path, number, name), f"{name} does not apply to full fine-tuning", "remove it, or write tune: lora"
                )


def _adapter_keys(spec: JobSpec) -> Iterator[Finding]:
    """Find keys of adapters where no trial has one; `_points` judges those of points."""
    search, finetune = spec.search, spec.finetune
    given: list[tuple[str, SearchSpec | FinetuneSpec, SearchSpec | FinetuneSpec]] = []
    if search is not None and search.algorithm != "fixed" and "lora" not in search.tune:
        given.append(("search", search, SearchSpec()))
    if finetune is not None and finetune.tune == "full":
        given.append(("finetune", finetune, FinetuneSpec()))
    for name, section, default in given:
        for key in ADAPTER_KEYS:
            if getattr(section, key) != getattr(default, key):
                message, hint = f"{key} does not apply to full fine-tuning", "remove it, or write tune: lora"
                yield Finding((name, key), message, hint, ((name, "tune"),))


def _controls(spec: JobSpec) -> Iterator[Finding]:
    for number, control in enumerate(spec.search.controls if spec.search is not None else ()):
        if control == "k_shot" and not spec.traits.has_answers:
            message = f"task {spec.task} has no answers that could be shown in a prompt"
            yield Finding(("search", "controls", number), message, "remove k_shot", (("task",),))


def _remedies(spec: JobSpec) -> Iterator[Finding]:
    """Yield mistakes: replay without text to replay, anchors that fit no tuning method, and what the task or the engine does
    not support."""
    for path, share in _replays(spec):
        if share:
            yield from _needs_text(spec, path, "replayed")
    for path, anchor in _anchors(spec):
        if isinstance(anchor, AnchorSpec) and anchor.strength:
            yield from _anchor_mistakes(spec, path, anchor)


def _replays(spec: JobSpec) -> Iterator[tuple[KeyPath, float]]:
    yield ("train", "replay"), spec.train.replay
    if spec.search is not None:
        for number, share in enumerate(spec.search.replay):
            yield ("search", "replay", number), share
        for number, point in enumerate(spec.search.points):
            if point.replay is not None:
                yield ("search", "points", number, "replay"), point.replay


def _anchors(spec: JobSpec) -> Iterator[tuple[KeyPath, Anchor]]:
    yield ("train", "anchor"), spec.train.anchor
    if spec.search is not None:
        for number, anchor in enumerate(spec.search.anchor):
            yield ("search", "anchor", number), anchor
        for number, point in enumerate(spec.search.points):
            if point.anchor is not None:
                yield ("search", "points", number, "anchor"), point.anchor


def _needs_text(spec: JobSpec, path: KeyPath, used: str) -> Iterator[Finding]:
    if not spec.traits.head.scores_retention:
        hint = "remove it; l2sp needs no retention text"
        yield Finding(
            path, f"a classifier has no output projection with which retention text could be {used}", hint, (("task",), path)
        )
    elif spec.data.retain is None:
        yield Finding(path, f"there is no retention text to be {used}", "give data.retain", (("data", "retain"), path))


def _anchor_mistakes(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Finding]:
    if anchor.traits.uses_fisher:
        yield from _needs_text(spec, path, "weighed by")
    if anchor.traits.whole_adapters:
        yield from _needs_whole_adapters(spec, path, anchor)
        yield from _needs_products(spec, path, anchor)
    judged = _tunes(spec, path)
    mismatched = tuple(place for tunes, place in judged if anchor.traits.tune not in tunes)
    if mismatched:
        message = anchor.traits.misfit.format(where=" and ".join(map(spell_path, mismatched)))
        elsewhere = _elsewhere(spec, mismatched[0]) if len(mismatched) < len(judged) else ""
        yield Finding(path, message, anchor.traits.instead + elsewhere, (*mismatched, path))


def _needs_whole_adapters(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Finding]:
    """Yield settings that require DeepSpeed: any given ZeRO stage, 0 too, and any offloading, which uses stage 3."""
    for key, asked in (("zero", spec.resources.zero), ("offload", spec.resources.offload)):
        if asked not in ("auto", "none"):
            message = f"resources.{key}: {asked} requires DeepSpeed, which the anchor `{anchor.kind}` does not support"
            yield Finding(path, message, f"remove resources.{key}", (("resources", key), path))


def _needs_products(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Finding]:
    """Yield kinds of adapters that change a weight by more than a product."""
    for place, kind in _kinds(spec, path):
        if not ADAPTER_KINDS[kind].adds_product:
            message = f"{kind} ({spell_path(place)}) changes weights by more than the product that `{anchor.kind}` penalises"
            yield Finding(path, message, f"remove the anchor, or {kind}", (place, path))


def _kinds(spec: JobSpec, path: KeyPath) -> Iterator[tuple[KeyPath, AdapterName]]:
    """Yield the kinds of adapters of the trials that an anchor at this place applies to; see `_tunes`."""
    search, of_train = spec.search, path[0] == "train"
    if search is not None and (search.algorithm == "fixed" or path[:2] == ("search", "points")):
        for number, point in enumerate(search.points):
            applies = point.anchor is None if of_train else path[2:3] == (number,)
            if point.tune == "lora" and applies:
                yield ("search", "points", number, "adapter"), point.adapter
    elif search is not None and "lora" in search.tune and not (of_train and search.anchor):
        for number, kind in enumerate(search.adapter):
            yield ("search", "adapter", number), kind
    if spec.finetune is not None and of_train and spec.finetune.tune == "lora":
        yield ("finetune", "adapter"), spec.finetune.adapter


def _tunes(spec: JobSpec, path: KeyPath) -> list[tuple[set[Tune], KeyPath]]:
    """Return the tuning methods that an anchor at this place applies to, and their places: an anchor of `train` applies to
    each section, except to trials that have anchors of their own."""
    search, of_train = spec.search, path[0] == "train"
    found: list[tuple[set[Tune], KeyPath]] = []
    if search is not None and path[:2] == ("search", "points"):
        number = path[2]
        assert isinstance(number, int)
        found.append(({search.points[number].tune}, (*path[:3], "tune")))
    elif search is not None and search.algorithm == "fixed":
        tunes: set[Tune] = {point.tune for point in search.points if point.anchor is None or not of_train}
        found += [(tunes, ("search", "points"))] if tunes else []
    elif search is not None and not (of_train and search.anchor):
        found.append((set(search.tune), ("search", "tune")))
    if spec.finetune is not None and of_train:
        found.append(({spec.finetune.tune}, ("finetune", "tune")))
    return found


def _elsewhere(spec: JobSpec, mismatched: KeyPath) -> str:
    """Return the hint for an anchor of `train` that fits only one of two sections."""
    place = "search.points" if spec.search is not None and spec.search.algorithm == "fixed" else "search.anchor"
    return f", or move it to {place}" if mismatched[0] == "finetune" else f", or override it with {place}"


def _duplicates(spec: JobSpec) -> Iterator[Finding]:
    if spec.search is None:
        return
    lists = {
        "layers": spec.search.layers,
        "tune": spec.search.tune,
        "lora_rank": spec.search.lora_rank,
        **{name: getattr(spec.search, name) for name in ADAPTER_KEYS},
        "controls": spec.search.controls,
        "replay": spec.search.replay,
        "anchor": spec.search.anchor,
        "layer_decay": spec.search.layer_decay,
    }
    for name, options in lists.items():
        first: dict[str, str] = {}
        for number, option in enumerate(options):
            normal = _normal(str(option), spec) if name == "layers" else str(option)
            if normal in first:
                message = f"the option {_written(option)} is a duplicate of {first[normal]}"
                yield Finding(("search", name, number), message, "remove one")
            first.setdefault(normal, _written(option))


def _written(option: object) -> str:
    """Return an option as the file has it: `{kind: l2sp, strength: 3}`."""
    if isinstance(option, AnchorSpec):
        return f"{{kind: {option.kind}, strength: {repr(option.strength).removesuffix('.0')}}}"
    return repr(option)


def _normal(text: str, spec: JobSpec) -> str:
    try:
        policy = parse_policy(text)
    except SelectionError:
        return text
    if spec.traits.head.is_new:  # there is no output projection that `+head` could add
        policy = policy.without("head")
    return str(policy)


def _new_tokens(spec: JobSpec) -> Iterator[Finding]:
    seen: set[str] = set()
    for number, token in enumerate(spec.base.add_tokens):
        if not token.strip():
            yield Finding(("base", "add_tokens", number), "the token is empty or white space", "remove it")
        elif token in seen:
            yield Finding(("base", "add_tokens", number), f"the token {token!r} is a duplicate", "remove one")
        seen.add(token)
    written: list[tuple[KeyPath, str]] = []
    if spec.search is not None:
        written += [(("search", "layers", number), text) for number, text in enumerate(spec.search.layers)]
        written += [(("search", "points", number, "layers"), point.layers) for number, point in enumerate(spec.search.points)]
    if spec.finetune is not None:
        written.append((("finetune", "layers"), spec.finetune.layers))
    for path, text in written:
        if not spec.base.add_tokens and "+new_tokens" in _normal(text, spec):
            remedy = "list the new tokens in base.add_tokens, or write +embeddings to train all rows"
            yield Finding(path, "`+new_tokens` trains the rows of the tokens in base.add_tokens, and there is none", remedy)


def _paths(spec: JobSpec) -> Iterator[Finding]:
    sources = () if isinstance(spec.data.train, str) else spec.data.train
    if not isinstance(spec.data.train, str) and not sources:
        yield Finding(("data", "train"), "the list of sources is empty", "give at least one {path: ...}")
    texts = {("base", "model"): spec.base.model, ("data", "train"): spec.data.train, ("output",): spec.output}
    texts |= {("data", name): getattr(spec.data, name) for name in ("eval", "test", "retain")}
    texts |= {("data", "train", number, "path"): source.path for number, source in enumerate(sources)}
    for path, text in texts.items():
        if isinstance(text, str) and not text.strip():
            yield Finding(path, "the path is empty")
        if isinstance(text, str) and path[0] == "data" and text.startswith(HUB) and parse_hub_data(text) is None:
            yield Finding(path, f"not a data set of the hub: {text!r}", f"write {DATA_SHAPE}")
    for name in ("eval", "test"):
        text = getattr(spec.data, name)
        if isinstance(text, str) and is_number(text):
            yield Finding(("data", name), f"found the text {text!r}; a share is a number", "drop the quotes")


CHECKS: tuple[Callable[[JobSpec], Iterator[Finding]], ...] = (
    _step_size,
    _ranges,
    _shares,
    _columns,
    _format,
    _classifier,
    _metric,
    _policies,
    _points,
    _adapter_keys,
    _controls,
    _remedies,
    _duplicates,
    _new_tokens,
    _paths,
)
