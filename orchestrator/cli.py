"""The command line: `orchestrator render | data | plan | finetune | sweep | merge | verify | report | doctor`.

Exit codes: 0 done, whatever the verdict · 2 bad spec, data or usage · 3 the plan does not fit · 4 training failed ·
5 nothing promoted, and `--require-promotion` was given · 6 the bundle failed its verification · 130 interrupted · 143 stopped.
Results go to stdout, progress and errors to stderr. Whatever is slow to import is imported by the command that
needs it, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from orchestrator.errors import NothingPromotedError, OrchestratorError, UsageError, VerificationError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.runtime import RunOutcome
    from orchestrator.spec import LoadedSpec
    from orchestrator.values import Value

INTERRUPTED = 130
UNEXPECTED = 4


class Commands(TyperGroup):
    """The one place where an exception becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            code = _interrupted()
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            code = _explain(error)
        raise typer.Exit(code)


def _interrupted() -> int:
    """The exit code: 128 and the number of the signal, as shells have it."""
    from orchestrator.store.stopping import stopped_by

    number = stopped_by()
    if number is not None:  # it was said when the signal came, and what ended in order may have come after it
        print("stopped; the same command goes on from what is on disk", file=sys.stderr)
        return 128 + number
    print("interrupted; the same command goes on from what is on disk", file=sys.stderr)
    return INTERRUPTED


def _explain(error: Exception) -> int:
    """Print what happened, the remedy last, and return the exit code. A bug shows its traceback, once."""
    # An error out of a Ray worker carries the original as its `cause`.
    known = next((e for e in (getattr(error, "cause", None), error) if isinstance(e, OrchestratorError)), None)
    if known is not None:
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code
    if type(error).__module__.startswith("typer."):
        raise error
    if type(error).__module__.startswith("ray."):
        from orchestrator.runtime.mishaps import cause_of

        print(f"error: {(known := cause_of(error))}", file=sys.stderr)
        return known.exit_code
    traceback.print_exception(error)
    print("this is a bug in orchestrator; the traceback above says where", file=sys.stderr)
    return UNEXPECTED


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Search which layers of a pretrained language model to unfreeze and at what learning rate; merge, verify, bundle.",
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML file that says what is wanted.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print a JSON object per event, the result last.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Folder of the runs, instead of the spec's.")]


def _name_cluster(address: str | None) -> str | None:
    """Ray reads its environment when it is imported, which comes later."""
    if address:
        os.environ["RAY_ADDRESS"] = address
    return address


Address = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", callback=_name_cluster, help="Ray to run on; without it a private one."),
]
RequirePromotion = Annotated[bool, typer.Option("--require-promotion", help="Exit with 5 when nothing is worth promoting.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. The jobs call it too."""
    # On some CPUs bitsandbytes asks at import for a kernel from a hub; nothing here uses it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app(args=arguments, prog_name="orchestrator")
    raise SystemExit(0)


@app.command()
def render(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The YAML file; not needed with --schema.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of specs instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the resolved spec, defaults filled in, and its hash."""
    from orchestrator.spec import dump_yaml, json_schema, load_spec

    if schema:
        _print_json(json_schema())
        return
    if spec is None:
        raise UsageError("render was given no SPEC", expected="a YAML file, or --schema", remedy="orchestrator render SPEC")
    loaded = load_spec(spec)
    if as_json:
        _print_json(loaded.spec.model_dump(mode="json"))
    else:
        print(dump_yaml(loaded), end="")


@app.command()
def data(spec: SpecPath, as_json: AsJson = False) -> None:
    """Read and tokenise the data: counts, dropped rows with reasons, one example with its supervised tokens marked."""
    from orchestrator.cli_inputs import inspect_data
    from orchestrator.spec import load_spec

    inspection = inspect_data(load_spec(spec))
    if as_json:
        _print_json(inspection.as_json())
    else:
        _print_rich(inspection.view())


@app.command()
def plan(
    spec: SpecPath,
    cluster: Annotated[Path | None, typer.Option("--cluster", metavar="FILE", help="Plan for the cluster in this file.")] = None,
    job: Annotated[str, typer.Option("--job", help="sweep or finetune; by default the one that the spec has, sweep first.")] = "",
    address: Address = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the derivation of every number too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what would be done: trials, memory, ZeRO stage, gangs, disk, GPU-hours. Needs no GPU, no cluster, no weights."""
    from orchestrator.cli_inputs import plan_of
    from orchestrator.report import plan_view
    from orchestrator.spec import load_spec

    planned = plan_of(load_spec(spec), job=job, cluster_file=cluster, address=address)
    if as_json:
        _print_json(planned)
    else:
        _print_rich(plan_view(planned, explain=explain))


@app.command()
def sweep(
    spec: SpecPath,
    output: Output = None,
    address: Address = None,
    require_promotion: RequirePromotion = False,
    as_json: JsonLines = False,
) -> None:
    """Search layers x learning rate, train the winner to the full budget, merge, verify, bundle."""
    _run("sweep", spec, output, address, require_promotion, as_json)


@app.command()
def finetune(
    spec: SpecPath,
    output: Output = None,
    address: Address = None,
    require_promotion: RequirePromotion = False,
    as_json: JsonLines = False,
) -> None:
    """Train the spec's one trial, merge, verify, bundle."""
    _run("finetune", spec, output, address, require_promotion, as_json)


def _run(job: str, spec: Path, output: Path | None, address: str | None, require_promotion: bool, as_json: bool) -> None:
    from orchestrator.report import open_view
    from orchestrator.spec import load_spec

    loaded = load_spec(spec)
    view = open_view(json_lines=as_json, stream=sys.stdout if as_json else sys.stderr)
    from orchestrator.runtime import run_finetune, run_sweep
    from orchestrator.store.stopping import stop_in_words

    stop_in_words()
    try:
        outcome = (run_sweep if job == "sweep" else run_finetune)(loaded, view=view, address=address, output=output)
    except VerificationError:
        _report_what_there_is(loaded, output)
        raise
    _show_outcome(outcome, as_json)
    if require_promotion and outcome.sweep.winner_id is None:
        raise NothingPromotedError(
            f"nothing was promoted: {outcome.sweep.promotion_reason}",
            where=str(outcome.run_folder),
            remedy="; ".join(outcome.sweep.advice) or "see the report for what to try",
        )


def _show_outcome(outcome: RunOutcome, as_json: bool) -> None:
    from orchestrator.report import final_screen
    from orchestrator.report.page import write_report

    report_path = write_report(outcome.run_folder)
    transfer = outcome.transfer.model_copy(update={"report": str(report_path)})
    if as_json:
        result = {"sweep": outcome.sweep.model_dump(mode="json"), "transfer": transfer.model_dump(mode="json")}
        _print_json({"kind": "result", "run": str(outcome.run_folder), **result}, indent=None)
    else:
        print(final_screen(outcome.sweep, transfer), flush=True)


def _report_what_there_is(loaded: LoadedSpec, output: Path | None) -> None:
    """A run that failed late has a report too; it says where the trouble is."""
    from orchestrator.report.page import write_report
    from orchestrator.runtime.places import output_root

    folder = output_root(loaded, output).path / loaded.spec.name
    if folder.is_dir():
        print(f"report: {write_report(folder)}", file=sys.stderr)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    trial: Annotated[str | None, typer.Option("--trial", metavar="ID", help="Another trial than the promoted one.")] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Promote it by hand; the run records that.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a trial of a finished run into a verified bundle: the promoted one, or another that you promote by hand."""
    from orchestrator.report import open_view
    from orchestrator.report.reading import read_run

    read_run(run)
    from orchestrator.runtime import merge_trial

    view = open_view(json_lines=as_json, stream=sys.stdout if as_json else sys.stderr)
    _show_outcome(merge_trial(run, trial, promote=promote, view=view), as_json)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    base: Annotated[Path | None, typer.Option("--base", metavar="DIR", help="The base, where it has moved.")] = None,
    held_out: Annotated[Path | None, typer.Option("--held-out", metavar="FILE", help="Its documents, if they moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a bundle against its manifest, and the merged model against what was trained."""
    from orchestrator.serve import verify_bundle

    figures = verify_bundle(bundle, base=base, held_out=held_out)
    if as_json:
        _print_json(figures)
    else:
        _print_facts(figures)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")], as_json: AsJson = False) -> None:
    """Write report.html from the run directory, finished or not."""
    from orchestrator.report.page import write_report

    path = write_report(run)
    if as_json:
        _print_json({"report": str(path)})
    else:
        print(path)


@app.command()
def doctor(address: Address = None, as_json: AsJson = False) -> None:
    """Look at this machine: versions, memory, disk, GPUs, Ray; what is wrong, and how to mend it."""
    from orchestrator.cli_machine import examine

    examination = examine(address)
    if as_json:
        _print_json(examination.as_json())
    else:
        _print_rich(examination.view())
    if examination.num_wrong:
        raise typer.Exit(UNEXPECTED)


def _print_json(value: object, *, indent: int | None = 2) -> None:
    """Strict JSON: what is not finite is null."""
    from orchestrator.values import strict_json

    print(json.dumps(strict_json(value), indent=indent, ensure_ascii=False, allow_nan=False), flush=True)


def _print_facts(value: Value) -> None:
    for name, content in value.model_dump(mode="json").items():
        print(f"{name.replace('_', ' '):<24} {content}")


def _print_rich(content: RenderableType) -> None:
    """At most 100 columns; without control codes where stdout is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(100, console.width) if console.is_terminal else 100
    console.print(content)


if __name__ == "__main__":
    main()
