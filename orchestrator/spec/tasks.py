"""The tasks: one row of traits each.

Every other module branches on a trait (`spec.traits.head.is_new`), never on the name of a task. To add a task, add its
name to `Task`, a row to `TASKS`, and its entry in the registries that are keyed by task: how its rows are laid out
(`data.reading.layouts`), how their columns are guessed (`data.reading.guess`), and how they are tokenised
(`data.encoding.encoder`). The code sample of the model card (`serve.usage`) branches on traits. A task that needs a new kind of
head also needs a `HeadTraits` row and a class in `train.model.heads`; a task that needs a new metric, a row in `METRICS` and its
computation in `train.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Task = Literal["chat", "completion", "text", "classify"]
HeadKind = Literal["language_model", "classification"]
Baseline = Literal["evaluation", "class prior"]
DataFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "labels"]


@dataclass(frozen=True)
class Metric:
    """Facts about a metric."""

    title: str
    """Its name in sentences."""
    higher_is_better: bool = True
    generated: bool = False
    """True if it is measured on generated answers, False if on teacher-forced predictions."""
    is_share: bool = False
    """True if it is between 0 and 1, and shown in percent."""
    hub_type: str = ""
    """The Hugging Face hub's name of it, if that differs from ours."""
    hub_title: str = ""
    """Its title in the model card's metadata, if that says more than `title`."""


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", higher_is_better=False, hub_title="loss, nats per supervised token"),
    "exact_match": Metric("exact match", generated=True, is_share=True),
    "accuracy": Metric("accuracy", is_share=True),
    "macro_f1": Metric("macro F1", is_share=True, hub_type="f1"),
}
"""The built-in metrics that trials can be compared by, by name, in the order in which messages list them."""
_PERPLEXITY = Metric("perplexity", higher_is_better=False)


def metric_facts(metric: str) -> Metric:
    """Return the facts about a metric: built in, reported only (`perplexity`), or a user's function, which compares texts."""
    return _PERPLEXITY if metric == "perplexity" else METRICS.get(metric) or Metric(metric, generated=True)


def higher_is_better(metric: str) -> bool:
    """Return whether larger values of a metric are better; a user's function (`package.module:function`) is always maximised."""
    known = METRICS.get(metric)
    return known.higher_is_better if known is not None else True


@dataclass(frozen=True)
class HeadTraits:
    """Facts about the head on top of the blocks: how it is loaded, trained, scored and served."""

    kind: HeadKind
    """Selects the class in `train.model.heads`."""
    is_new: bool
    """The checkpoint has no such head: it is initialised, trained under every policy but `none`, and saved. The base's own output
    projection is then neither loaded nor merged."""
    supervises: Literal["tokens", "documents"]
    """The unit that the loss is averaged over: supervised tokens, or documents."""
    one_document_per_row: bool
    """The prediction is read off the end of a row, so that documents cannot be packed."""
    scores_retention: bool
    """The model still predicts tokens, so that retention text can be scored, replayed, and used for EWC."""
    encoders: bool
    """True if encoders can be trained too, not only decoders."""
    baseline: Baseline
    """The meaning of the control `none`: an evaluation of the base or, for a new head, the frequencies of the classes."""
    auto_model: str
    """The transformers class that loads the bundle."""
    pipeline_tag: str
    """The Hugging Face hub's name of the task, for the model card."""
    peft_task: str
    """PEFT's `TaskType`, for adapter_config.json."""
    runner: str
    """The value of vLLM's `--runner`; empty for its default, which generates text."""

    @property
    def training_unit(self) -> str:
        """The unit of a training loss, which always counts supervised tokens."""
        return "nats per supervised token" if self.supervises == "tokens" else self.unit

    @property
    def unit(self) -> str:
        """The unit of a loss."""
        return f"nats per {self.supervises.removesuffix('s')}"


LANGUAGE_MODEL = HeadTraits(
    kind="language_model",
    is_new=False,
    supervises="tokens",
    one_document_per_row=False,
    scores_retention=True,
    encoders=False,
    baseline="evaluation",
    auto_model="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    peft_task="CAUSAL_LM",
    runner="",
)
CLASSIFICATION = HeadTraits(
    kind="classification",
    is_new=True,
    supervises="documents",
    one_document_per_row=True,
    scores_retention=False,
    encoders=True,
    baseline="class prior",
    auto_model="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    peft_task="SEQ_CLS",
    runner="pooling",
)
HEADS: Mapping[HeadKind, HeadTraits] = {head.kind: head for head in (LANGUAGE_MODEL, CLASSIFICATION)}


@dataclass(frozen=True)
class TaskTraits:
    """Facts about a task: how it reads rows, what it trains on, and what can be measured."""

    head: HeadTraits
    columns: tuple[str, ...]
    """Keys of `data.columns` that a row must have."""
    optional_columns: tuple[str, ...]
    """Keys of `data.columns` that are read where rows have them."""
    formats: tuple[DataFormat, ...]
    metrics: tuple[str, ...]
    """Built-in metrics that fit; the first is the default."""
    question: str
    """The column of a question in an answers' file, unless the question is a list of messages."""
    has_answers: bool = False
    """A row has a prompt and an answer, which the model can generate: answers end with a learned end token, are compared with the
    expected ones, and can be shown in a prompt (`k_shot`)."""
    two_texts: bool = False
    """A row is one prompt and one answer, and nothing else: what an encoder and a decoder can read one each."""
    uses_chat_template: bool = False
    """Prompts are chat turns, rendered by the tokenizer's chat template."""
    uses_separator: bool = False
    """True if `data.separator` is inserted between prompt and answer, in training and serving."""
    fills_alpaca_templates: bool = False
    """Alpaca rows become text by a template, with a second one for rows without input."""
    cuts_into_chunks: bool = False
    """Rows are running text: a text file is a document, and a long document becomes several chunks."""

    @property
    def has_labels(self) -> bool:
        """Return whether a row has a class as its label."""
        return "label" in self.columns


TASKS: Mapping[Task, TaskTraits] = {
    "chat": TaskTraits(
        head=LANGUAGE_MODEL,
        columns=("messages",),
        optional_columns=("prompt", "completion", "input", "system", "tools"),
        formats=("messages", "sharegpt", "prompt_completion", "alpaca"),
        metrics=("loss", "exact_match"),
        question="prompt",
        has_answers=True,
        uses_chat_template=True,
    ),
    "completion": TaskTraits(
        head=LANGUAGE_MODEL,
        columns=("prompt", "completion"),
        optional_columns=("input",),
        formats=("prompt_completion", "alpaca"),
        metrics=("loss", "exact_match"),
        question="prompt",
        has_answers=True,
        two_texts=True,
        uses_separator=True,
        fills_alpaca_templates=True,
    ),
    "text": TaskTraits(
        head=LANGUAGE_MODEL,
        columns=("text",),
        optional_columns=(),
        formats=("text",),
        metrics=("loss",),
        question="text",
        cuts_into_chunks=True,
    ),
    "classify": TaskTraits(
        head=CLASSIFICATION,
        columns=("text", "label"),
        optional_columns=(),
        formats=("labels",),
        metrics=("loss", "accuracy", "macro_f1"),
        question="text",
    ),
}


def head_of(task: str) -> HeadTraits:
    """Return the head of a task of any version's record; an unknown task is assumed to supervise tokens."""
    return next((traits.head for name, traits in TASKS.items() if name == task), LANGUAGE_MODEL)


def loss_unit(task: str) -> str:
    """Return the unit of a task's loss."""
    return head_of(task).unit


RETENTION_TASKS: tuple[Task, ...] = ("text", "completion", "chat")
"""Layouts for a row of the retention set: the first one whose columns the row has is used."""
