"""The Python API: the commands as functions, for programs and notebooks.

    import orchestrator

    plan = orchestrator.plan("spec.yaml")                            # trials, memory, hours; needs no GPU and no weights
    run = orchestrator.sweep("spec.yaml", overrides={"search.trials": 4})
    run.verdict, run.trials, run.figures                             # what was found
    model, tokenizer = run.bundle.load()                             # plain transformers
    run = orchestrator.load_run("runs/math-tutor")                   # a run of another day, finished or not

A spec is a file's path, a dictionary with the same keys, or a `JobSpec`. Nothing slow is imported before it is needed.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import UsageError
from orchestrator.spec import JobSpec, LoadedSpec, load_spec
from orchestrator.spec.loader import load_values
from orchestrator.spec.tasks import TASKS

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.plan.values import RunPlan
    from orchestrator.run.reader import RunRecords
    from orchestrator.serve.predict import Answer
    from orchestrator.transfer.records import SweepResult, TransferReport, TrialRecord

Spec = str | Path | Mapping[str, Any] | JobSpec | LoadedSpec
"""Path of a YAML file, its values as a dictionary, or a spec that was read."""
Overrides = Mapping[str, Any]
"""Values that replace the spec's, by dotted key: `{"search.trials": 4, "search.layers": ["last:2"]}`."""
TRIAL_COLUMNS = (
    "trial_id",
    "number",
    "control",
    "layers",
    "tune",
    "lora_rank",
    "method",
    "learning_rate",
    "remedies",
    "seed",
    "state",
    "reason",
    "step",
    "total_steps",
    "metric",
    "eval_loss",
    "retain_loss",
    "forgetting",
    "score",
    "seconds",
    "trainable_parameters",
    "promoted",
)
"""Columns of `Run.trials`; the first is its index. Losses are nats per token, times seconds."""
SECTION = re.compile(r"<section\b.*?</section>", re.DOTALL)
HEADING = re.compile(r"<h2[^>]*>(.*?)</h2>", re.DOTALL)
PICTURE = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")


def plan(spec: Spec, *, overrides: Overrides | None = None, job: str = "", cluster: Path | str | None = None) -> RunPlan:
    """Plan a job: trials, memory and time, with the data estimated from file sizes.

    Args:
        spec: See `Spec`.
        overrides: See `Overrides`.
        job: `sweep` or `finetune`; by default the one that the spec has, sweep first.
        cluster: A file that describes a cluster; by default this machine.

    Raises:
        SpecError, BaseError, SelectionError, DataError, UsageError: the input cannot be used.
        PlanError: it does not fit.
    """
    from orchestrator.inputs import plan_of

    return plan_of(as_loaded(spec, overrides), job=job, cluster_file=Path(cluster) if cluster is not None else None)


def sweep(
    spec: Spec,
    *,
    overrides: Overrides | None = None,
    output: Path | str | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Run:
    """Search layers and learning rate, refit the winner, merge, verify and judge it; or continue an interrupted run.

    Args:
        spec: See `Spec`.
        overrides: See `Overrides`.
        output: Folder for runs; overrides the spec's `output`.
        address: Ray to run on; RAY_ADDRESS or a private one without it.
        progress: Whether to print a line for every event to stderr.

    Raises:
        OrchestratorError: whatever stops the run, see `orchestrator.errors`; what was done is on disk.
    """
    return _run("sweep", spec, overrides, output, address, progress)


def finetune(
    spec: Spec,
    *,
    overrides: Overrides | None = None,
    output: Path | str | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Run:
    """Train the spec's one trial, merge, verify and judge it. Arguments and errors as for `sweep`."""
    return _run("finetune", spec, overrides, output, address, progress)


def load_run(folder: Path | str) -> Run:
    """Open a run by its folder, finished or not.

    Raises:
        UsageError: it is no run directory.
    """
    run = Run(Path(folder).expanduser())
    _ = run.records
    return run


def as_loaded(spec: Spec, overrides: Overrides | None = None) -> LoadedSpec:
    """Load and validate the spec. Relative paths start at its file's folder, or at the current folder if it has no file.

    Raises:
        SpecError: everything that is wrong with it.
        UsageError: `spec` has a type that is not accepted.
    """
    if isinstance(spec, str | Path):
        return load_spec(spec, overrides or {})
    if isinstance(spec, LoadedSpec):
        return load_values(_values_of(spec.spec), spec.folder, overrides) if overrides else spec
    if isinstance(spec, JobSpec):
        return load_values(_values_of(spec), Path.cwd(), overrides)
    if isinstance(spec, Mapping):
        return load_values(spec, Path.cwd(), overrides)
    expected = "a path, a dictionary, a JobSpec or a LoadedSpec"
    raise UsageError(f"the spec is a {type(spec).__name__}", expected=expected, remedy="give the path of a spec's file")


def _values_of(spec: JobSpec) -> dict[str, Any]:
    """Return only the values that were given: an explicit default may be validated differently."""
    return spec.model_dump(mode="json", exclude_unset=True)


def _run(
    job: Literal["sweep", "finetune"],
    spec: Spec,
    overrides: Overrides | None,
    output: Path | str | None,
    address: str | None,
    progress: bool,
) -> Run:
    loaded = as_loaded(spec, overrides)
    from orchestrator.report import LogView, open_view
    from orchestrator.report.page import write_report
    from orchestrator.runtime import run_finetune, run_sweep

    view = open_view(json_lines=False, stream=sys.stderr) if progress else LogView(io.StringIO())
    start = run_sweep if job == "sweep" else run_finetune
    outcome = start(loaded, view=view, address=address, output=Path(output) if output is not None else None)
    write_report(outcome.run_folder)
    return Run(outcome.run_folder)


@dataclass(frozen=True)
class Figure:
    """Picture of the report."""

    title: str
    """The heading of its section."""
    svg: str

    def save(self, file: Path | str) -> Path:
        """Write it as an SVG file."""
        target = Path(file)
        target.write_text(self.svg, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return f'<figure style="margin:0;background:#fff"><figcaption>{escape(self.title)}</figcaption>{self.svg}</figure>'

    def __repr__(self) -> str:
        return f"Figure({self.title!r}, {len(self.svg):,} characters of SVG)"


class Figures(Mapping[str, Figure]):
    """Pictures of the report by section heading; a notebook shows all of them."""

    def __init__(self, figures: Mapping[str, Figure]) -> None:
        self._figures = dict(figures)

    def __getitem__(self, title: str) -> Figure:
        if title not in self._figures:
            raise KeyError(f"no figure {title!r}; there are {', '.join(self._figures) or 'none'}")
        return self._figures[title]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def _repr_html_(self) -> str:
        return "".join(figure._repr_html_() for figure in self._figures.values())

    def __repr__(self) -> str:
        return f"Figures({', '.join(self._figures)})"


@dataclass(frozen=True)
class Bundle:
    """Finished bundle: merged model with its tokenizer, verified against the trained model."""

    folder: Path

    def load(self, **options: Any) -> tuple[Any, Any]:
        """Return model and tokenizer loaded by plain transformers; a classifier as `AutoModelForSequenceClassification`, or as
        the `Classifier` of its own `classify.py`, whose output has `logits` too.

        Args:
            options: For the model's `from_pretrained`, such as `device_map="auto"`, or `trust_remote_code=True`
                for a bundle that has the code of its base: the manifest names its hash, which this does not check.

        Raises:
            UsageError: it is no bundle.
        """
        import transformers

        from orchestrator.serve.classifier import has_head_file, load_classifier
        from orchestrator.serve.loading import serving_class
        from orchestrator.serve.predict import read_spec

        options = {"local_files_only": True, "dtype": "auto", "trust_remote_code": False, **options}
        head = TASKS[read_spec(self.folder)["task"]].head
        if head.is_new and has_head_file(self.folder):
            model = load_classifier(self.folder, **options)
        else:
            model = getattr(transformers, serving_class(self.folder, head.auto_model)).from_pretrained(self.folder, **options)
        trust: bool = options["trust_remote_code"]
        return model, transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=trust)

    def predict(self, questions: list[Any], *, max_new_tokens: int = 256) -> list[Answer]:
        """Return greedy answers to prompts (or to lists of messages), or the classes of texts, in their order.

        Raises:
            DataError: a question that cannot be put, by its number.
        """
        from orchestrator.serve.predict import Question, answer_all, first_turn, open_predictor

        predictor = open_predictor(self.folder)
        chat = predictor.chats
        contents = [
            (first_turn(content) if chat else content) if isinstance(content, str) else tuple(content) for content in questions
        ]
        asked = [Question(content, f"question {number}") for number, content in enumerate(contents, 1)]
        found = dict(answer_all(predictor, asked, max_new_tokens))
        return [found[number] for number in range(len(asked))]


@dataclass(frozen=True)
class Run:
    """Run directory, finished or in progress. What was read is cached; `reload()` reads it again."""

    folder: Path

    @cached_property
    def records(self) -> RunRecords:
        """All records of the run: plan, steps, events, and what could not be read."""
        from orchestrator.run.reader import read_run

        return read_run(self.folder)

    def reload(self) -> Run:
        """Read the run again."""
        return load_run(self.folder)

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def finished(self) -> bool:
        """True if the run is complete."""
        return self.records.complete

    @property
    def sweep(self) -> SweepResult | None:
        """Results of the search; None before the first trial."""
        return self.records.sweep

    @property
    def transfer(self) -> TransferReport | None:
        """Evaluation of the promoted model on the test set; None before it was judged."""
        return self.records.transfer

    @property
    def verdict(self) -> str | None:
        """`positive`, `no gain`, `negative` or `inconclusive`; None if nothing was promoted, or not yet."""
        return self.transfer.verdict if self.transfer else None

    @property
    def sentence(self) -> str:
        """Verdict in one sentence with its figures."""
        from orchestrator.report.wording import verdict_sentence

        return verdict_sentence(self.sweep, self.transfer)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """Trials and controls by id, one row each: their settings, and the figures by which they are compared."""
        import pandas as pd

        sweep = self.sweep
        rows = [_trial_row(trial, sweep.winner_id if sweep else None) for trial in (sweep.trials if sweep else ())]
        return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS)).set_index("trial_id")

    def trial(self, wanted: str | int) -> TrialRecord:
        """Return a trial by its number, its id, or the beginning of its id.

        Raises:
            UsageError: no such trial; names those that are near.
        """
        from orchestrator.transfer.trial_lookup import find_trial

        known = {trial.trial_id: trial for trial in (self.sweep.trials if self.sweep else ())}
        return known[find_trial(wanted, {trial_id: trial.number for trial_id, trial in known.items()})]

    @cached_property
    def figures(self) -> Figures:
        """Pictures of the report as SVG, by section heading."""
        from orchestrator.report.page import render_page

        found: dict[str, Figure] = {}
        for section in SECTION.findall(render_page(self.records)):
            heading = HEADING.search(section)
            title = unescape(TAG.sub("", heading[1])).strip() if heading else self.name
            for svg in PICTURE.findall(section):
                count = sum(key.split(" (")[0] == title for key in found)
                key = f"{title} ({count + 1})" if count else title
                found[key] = Figure(key, svg)
        return Figures(found)

    @property
    def bundle(self) -> Bundle:
        """The serving bundle.

        Raises:
            UsageError: there is none: nothing was promoted, or not yet.
        """
        folder = self.folder / "bundle"
        if not (folder / "manifest.json").is_file():
            reason = self.sweep.promotion_reason if self.sweep else "no trial has begun"
            raise UsageError(f"the run has no bundle: {reason}", where=str(self.folder), remedy="`run.report()` says what to try")
        return Bundle(folder)

    def report(self) -> Path:
        """Write report.html and return its path."""
        from orchestrator.report.page import write_report

        return write_report(self.folder)

    def _repr_html_(self) -> str:
        trials = self.trials.drop(columns=["seed", "reason"], errors="ignore")._repr_html_()
        return f"<p><strong>{escape(self.name)}</strong>: {escape(self.sentence)}</p>{trials}"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'not finished'}, verdict={self.verdict!r})"


def _trial_row(trial: TrialRecord, winner_id: str | None) -> dict[str, Any]:
    judged = trial.judged
    extra = {
        "step": judged.step if judged else 0,
        "eval_loss": judged.eval_loss if judged else None,
        "promoted": trial.trial_id == winner_id,
    }
    return {name: extra[name] if name in extra else getattr(trial, name) for name in TRIAL_COLUMNS}


__all__ = [
    "Answer",
    "Bundle",
    "Figure",
    "Figures",
    "Overrides",
    "Run",
    "Spec",
    "as_loaded",
    "finetune",
    "load_run",
    "plan",
    "sweep",
]
