"""The model card: what the bundle is, how it was made, what was measured, how to serve it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from orchestrator.plan import REPEAT
from orchestrator.plan.merge_operations import HEAD_FILE
from orchestrator.serve.bundle_inputs import BundleInputs, base_label
from orchestrator.serve.classifier import LOADER, READ
from orchestrator.serve.metadata import front_matter, licence_sentence
from orchestrator.serve.usage import gguf_rule, prompt_rule, snippet
from orchestrator.spec.adapters import ADAPTER_KINDS
from orchestrator.spec.tasks import HeadTraits, metric_facts
from orchestrator.transfer.headline import advice_on_answers, gain_is_loss_only, headline
from orchestrator.transfer.records import CONTROL_NAMES, ModelScores, PromptComparison, TransferReport, VerificationFigures
from orchestrator.transfer.verdict_advice import advice_after, decided_by
from orchestrator.units import format_count

NAMES = {"promoted": "this model", **CONTROL_NAMES}
NOT_SHOWN = {
    "none": "a gain over the base was not shown",
    "scratch": "a gain over the base was shown, but not over random weights trained from scratch",
    "repeat": "a gain over the base was shown for this model, but not for training from other seeds",
}
"""Claim that a verdict other than `positive` leaves unproven, by the comparison that decided it."""
MERGED_INTO = {
    "dequantized": "the base's quantized weights as used in training, dequantized to 16 bits",
    "original": "the base's stored weights",
}
HELD_AS = {"nf4": "nf4, double quantization", "int8": "int8, a scale per row"}
NEEDS_SERVING = "# pip install 'transformers[serving]'"
"""Comment after `transformers serve`, which needs more than the plain package."""
TRUST = " --trust-remote-code"
"""Option of servers for a bundle that has its base's own code."""
CELL = 240
"""Characters of a prompt or an answer that a card shows."""


def model_card(inputs: BundleInputs, transfer: TransferReport, versions: Mapping[str, str]) -> str:
    """Return the text of README.md. It contains no paths of this machine."""
    assert transfer.verification is not None
    sections = [
        front_matter(inputs, transfer),
        f"# {inputs.name}\n\n{_summary(inputs, transfer)}",
        _how_it_was_made(inputs, versions),
        _results(transfer),
        _prompts(transfer.prompts),
        _verification(transfer.verification, inputs.base.traits.head),
        _serving(inputs, transfer),
        _limitations(inputs, transfer),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(inputs: BundleInputs, transfer: TransferReport) -> str:
    found = headline(transfer)
    said = f" {found[:1].upper()}{found[1:]}." if found else ""
    return f"`{base_label(inputs.base_name)}`, tuned for the task `{inputs.base.task}`.{said}"


def _how_it_was_made(inputs: BundleInputs, versions: Mapping[str, str]) -> str:
    trial, selection = inputs.trial, inputs.selection
    # A policy by score says nothing to a reader who has not the scores.
    which = f" (blocks {', '.join(map(str, selection.blocks))})" if trial.layers.startswith("top:") else ""
    method = trial.adapter.sentence(trial.lora_rank) if trial.tune == "lora" else "full fine-tuning"
    rows = [
        ("base", f"{base_label(inputs.base_name)}, revision {inputs.base.revision or 'not given'}"),
        *([("the base's own code", _own_code(inputs))] if inputs.base.code_sha256 else []),
        ("base held as", HELD_AS.get(inputs.base.quantize, inputs.held_dtype)),
        ("trained layers", f"`{trial.layers}`{which}: {format_count(selection.num_trainable_parameters)} parameters"),
        ("method", method),
        ("learning rate", f"{trial.learning_rate:.3g}"),
        *([("against forgetting", str(trial.remedies))] if str(trial.remedies) else []),
        ("training", f"{_steps(inputs)}, seed {trial.seed}"),
        ("data", f"SHA-256 {inputs.data_sha256}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return "## How it was made\n\n" + _table(("what", "value"), rows)


def _own_code(inputs: BundleInputs) -> str:
    files = ", ".join(f"`{name}`" for name in inputs.anatomy.code_files)
    return f"{files}, here as in the base: SHA-256 {inputs.base.code_sha256}. Loading this model runs it: read it first"


def _steps(inputs: BundleInputs) -> str:
    """Return `40 steps, 12k tokens`; `12 of 40 steps` for an earlier checkpoint."""
    trial = inputs.trial
    if inputs.step is not None and inputs.step < trial.total_steps:
        return f"{inputs.step} of {trial.total_steps} steps"
    return f"{trial.total_steps} steps, {format_count(trial.total_tokens)} tokens"


def _results(transfer: TransferReport) -> str:
    if not transfer.scores:
        return ""
    metrics = list(dict.fromkeys(name for scores in transfer.scores for name in scores.metrics))
    has_retention = any(scores.retain_loss is not None for scores in transfer.scores)
    has_answers = any(scores.retain_accuracy is not None for scores in transfer.scores)
    header = ["model", *metrics, *(["retention loss", "forgetting"] if has_retention else [])]
    header += ["retention accuracy"] if has_answers else []
    rows = [_score_row(scores, metrics, has_retention=has_retention, has_answers=has_answers) for scores in transfer.scores]
    lines = [
        "## Results on the test set",
        "",
        _reads(transfer),
        "",
        _table(header, rows),
    ]
    for comparison in transfer.comparisons:
        against = NAMES.get(comparison.against, comparison.against)
        interval = f"95% interval [{comparison.low:+.3f}, {comparison.high:+.3f}]"
        interval = interval if math.isfinite(comparison.low) else "too few examples for an interval"
        lines.append(
            f"\nGain over {against}: {comparison.mean:+.3f} {comparison.unit}, {interval}, "
            f"{comparison.num_examples} examples ({comparison.method.replace('_', ' ')})."
        )
    return "\n".join(lines)


def _reads(transfer: TransferReport) -> str:
    if transfer.test_set_reads > 1:
        return (
            f"The test set has been read {transfer.test_set_reads} times for this run; after the first reading it "
            "is no longer unseen."
        )
    return "The test set was read once, after all choices were made."


def _score(scores: ModelScores, metric: str) -> str:
    number = _number(scores.metrics.get(metric))
    taken_over = metric_facts(metric).generated and metric in scores.metrics and scores.num_answered
    return f"{number} on {scores.num_answered} of {scores.num_documents}" if taken_over else number


def _name(model: str) -> str:
    if model.startswith(REPEAT):
        return f"this model trained with seed no. {model.removeprefix(REPEAT)}"
    return NAMES.get(model, model)


def _score_row(scores: ModelScores, metrics: list[str], *, has_retention: bool, has_answers: bool) -> list[str]:
    row = [_name(scores.model), *(_score(scores, name) for name in metrics)]
    if has_retention:
        row += [_number(scores.retain_loss), "-" if scores.forgetting is None else f"{scores.forgetting:+.3f}"]
    if has_answers:
        row.append("-" if scores.retain_accuracy is None else f"{scores.retain_accuracy:.1%}")
    return row


def _prompts(prompts: tuple[PromptComparison, ...]) -> str:
    if not prompts:
        return ""
    rows = [(_cell(p.prompt), _cell(p.expected), _cell(p.base_answer), _cell(p.tuned_answer)) for p in prompts]
    return "## Answers\n\nThe first documents of the test set.\n\n" + _table(("prompt", "expected", "base", "this model"), rows)


def _verification(figures: VerificationFigures, head: HeadTraits) -> str:
    merged_into = MERGED_INTO.get(figures.merged_into, figures.merged_into)
    return (
        f"## Verification\n\nMerged into {merged_into}. Loaded by plain transformers in a fresh process, the merged model "
        f"differs from the trained one by KL {figures.kl_bundle:.2g} {head.unit} (the base model: {figures.kl_base:.2g}; "
        f"limit {figures.limit:.2g}), on {figures.num_prompts} held-out documents.{_by_document(figures)} "
        "`manifest.json` has the SHA-256 of every file; `orchestrator verify .` repeats the check."
    )


def _by_document(figures: VerificationFigures) -> str:
    found = figures.classified
    if found is None:
        return ""
    return (
        " None of these, and of some texts with odd endings, gets another class; the largest KL of a document is "
        f"{found.largest_kl:.2g} (limit {found.limit:.2g})."
    )


def _serving(inputs: BundleInputs, transfer: TransferReport) -> str:
    head = inputs.base.traits.head
    pooling = inputs.base.pooling
    if head.runner and not pooling.by_class:
        commands = [f"python {LOADER} {'A text to classify.'!r}"]
        said = [
            f"The head reads {READ[pooling.kind]}, for which transformers has no class: it is in `{HEAD_FILE}`, and "
            f"`{LOADER}` puts it on the model that `AutoModel.from_pretrained` loads. `AutoModelForSequenceClassification` "
            "would give that a random head. The class names are in config.json."
        ]
    elif head.runner:
        commands = [f"vllm serve . --runner {head.runner}"]
        said = ["The class names are in config.json."]
    else:
        trust = TRUST if inputs.base.code_sha256 else ""
        commands = [f"transformers serve .{trust}    {NEEDS_SERVING}", f"vllm serve .{trust}"]
        said = [line for line in (prompt_rule(inputs), gguf_rule(inputs)) if line]
    if inputs.trial.tune == "lora":
        title = ADAPTER_KINDS[inputs.trial.adapter.kind].title
        said.append(f"The {title} adapter alone is in `adapter/`; `peft.PeftModel.from_pretrained` loads it on the base.")
    else:
        said.append("The changed tensors alone are in `delta/`.")
    shown = "\n".join(f"    {command}" for command in commands)
    warning = advice_after(transfer)[:1] if transfer.verdict == "negative" else ()
    warned = "".join(f"{line[:1].upper()}{line[1:]}.\n\n" for line in warning)
    code = f"```python\n{snippet(inputs, transfer)}```"
    how = "As a server" if pooling.by_class else "From a shell"
    return f"## Serving\n\n{warned}From Python, in this folder:\n\n{code}\n\n{how}:\n\n{shown}\n\n" + "\n\n".join(said)


def _limitations(inputs: BundleInputs, transfer: TransferReport) -> str:
    said = [
        "The figures hold for data like the test set; nothing was measured beyond it"
        + (" and the retention set." if inputs.retain_set else "."),
        "This model may repeat the base model's errors and unwanted outputs.",
        licence_sentence(Path(inputs.base.folder)),
    ]
    if not inputs.retain_set:
        said.append("No retention set was given: forgetting was not measured.")
    if gain_is_loss_only(transfer):
        said.append("It gives no more correct answers than the base: " + advice_on_answers(transfer)[0] + ".")
    if transfer.verdict not in (None, "positive"):
        said.append(f"The verdict is `{transfer.verdict}`: {_not_shown(transfer)}.")
    return "## Limitations\n\n" + "\n".join(f"* {line}" for line in said)


def _not_shown(transfer: TransferReport) -> str:
    """Return what was not proven: an unclear gain over the base comes before whatever else decided."""
    gain = next((comparison for comparison in transfer.comparisons if comparison.against == "none"), None)
    return NOT_SHOWN[decided_by(transfer) if gain is not None and gain.low > 0 else "none"]


def _table(header: tuple[str, ...] | list[str], rows: list) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    short = text if len(text) <= CELL else text[: CELL - 1] + "…"
    return short.replace("|", "\\|").replace("\n", "<br>")
