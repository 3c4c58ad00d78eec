"""The command line: `orchestrator COMMAND`, or `python -m orchestrator COMMAND`; `cli.group.GROUPS` lists the commands.

Exit codes: 0 done, whatever the verdict · 2 bad spec, data or usage · 3 the plan does not fit · 4 training failed ·
5 nothing promoted, and `--require-promotion` was given · 6 the bundle failed its verification · 130 interrupted · 143 stopped.
Results go to stdout, progress and errors to stderr. Modules that are slow to import are imported inside the command that
needs them, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from orchestrator.cli import bundles as cli_bundles
from orchestrator.cli import init as cli_init
from orchestrator.cli import runs as cli_runs
from orchestrator.cli.group import EPILOG, GroupedHelp, print_version
from orchestrator.cli.output import AsJson, print_facts, print_json, print_rich
from orchestrator.errors import NothingPromotedError, OrchestratorError, UsageError, VerificationError
from orchestrator.units import printable, printable_lines

if TYPE_CHECKING:
    from orchestrator.run.records import RunOutcome
    from orchestrator.spec import LoadedSpec

INTERRUPTED = 130
UNEXPECTED = 4
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Errors of the operating system that mean: nothing can be written there."""


class Commands(GroupedHelp):
    """The command group; the only place that turns an exception into a message and an exit code."""

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
    """Print how to continue and return the exit code: 128 plus the signal's number, as in shells."""
    from orchestrator.store.signals import stopped_by

    number = stopped_by()
    if number is not None:  # the signal itself was reported when it arrived; an orderly shutdown may follow it
        print("stopped; run the same command again to continue from what is on disk", file=sys.stderr)
        return 128 + number
    print("interrupted; run the same command again to continue from what is on disk", file=sys.stderr)
    return INTERRUPTED


def _explain(error: Exception) -> int:
    """Print the error, its remedy last, and return the exit code. A bug prints its traceback once."""
    # An error raised in a Ray worker carries the original as its `cause`.
    known = next((e for e in (getattr(error, "cause", None), error) if isinstance(e, OrchestratorError)), None)
    if known is not None:
        print("\n".join(map(printable, f"error: {known}".split("\n"))), file=sys.stderr)
        return known.exit_code
    if type(error).__module__.startswith("typer."):
        raise error
    if type(error).__module__.startswith("ray."):
        from orchestrator.runtime.failures import cause_of

        print(f"error: {(known := cause_of(error))}", file=sys.stderr)
        return known.exit_code
    failed = next((e for e in (getattr(error, "cause", None), error) if isinstance(e, OSError)), None)
    if failed is not None and (failed.errno in UNWRITABLE or "No usable temporary directory" in str(failed)):
        where = f"{failed.filename}: " if failed.filename else ""
        print(printable(f"error: {where}{failed.strerror or failed}"), file=sys.stderr)
        print(
            (
                "  to do: free space or grant write permission there, then run the same command again: it continues from "
                "what is on disk"
            ),
            file=sys.stderr,
        )
        return UNEXPECTED
    print(printable_lines("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    print("this is a bug in orchestrator; the traceback above says where", file=sys.stderr)
    return UNEXPECTED


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Search which layers of a pretrained language model to unfreeze and at what learning rate; merge, verify, bundle.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print a JSON object per event, the result last.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the spec, such as search.trials=4 (YAML); repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; start and write nothing.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Folder for runs; overrides the spec's `output`.")]


def _name_cluster(address: str | None) -> str | None:
    """Put the address into the environment, which Ray reads when it is imported, later."""
    if address:
        os.environ["RAY_ADDRESS"] = address
    return address


Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        callback=_name_cluster,
        help="Ray cluster to run on; without it a private Ray is started.",
    ),
]
RequirePromotion = Annotated[bool, typer.Option("--require-promotion", help="Exit with 5 when nothing is worth promoting.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. The jobs call it too."""
    # On some CPUs bitsandbytes requests a kernel from a hub when it is imported; nothing here uses it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app(args=arguments, prog_name="orchestrator")
    raise SystemExit(0)


@app.callback()
def orchestrator(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Accept the options before a command."""


@app.command()
def render(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The YAML file; not needed with --schema.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of specs instead.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved spec, defaults filled in, and its hash."""
    from orchestrator.spec import dump_yaml, json_schema, load_spec

    if schema:
        print_json(json_schema())
        return
    if spec is None:
        raise UsageError("render was given no SPEC", expected="a YAML file, or --schema", remedy="orchestrator render SPEC")
    loaded = load_spec(spec, overrides or ())
    if as_json:
        print_json(loaded.spec.model_dump(mode="json"))
    else:
        print(dump_yaml(loaded), end="")


@app.command()
def data(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read and tokenise the data: counts, dropped rows with reasons, one example with its supervised tokens marked."""
    from orchestrator.inputs import inspect_data
    from orchestrator.spec import load_spec

    inspection = inspect_data(load_spec(spec, overrides or ()))
    if as_json:
        print_json(inspection.as_json())
    else:
        print_rich(inspection.view())


@app.command()
def plan(
    spec: SpecPath,
    cluster: Annotated[Path | None, typer.Option("--cluster", metavar="FILE", help="Plan for the cluster in this file.")] = None,
    overrides: Overrides = None,
    job: Annotated[
        str, typer.Option("--job", help="sweep or finetune; by default the section that the spec has, sweep if both.")
    ] = "",
    address: Address = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also print how every number is derived.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: trials, memory, ZeRO stage, gangs, disk, GPU-hours. Needs no GPU, no cluster, no weights."""
    from orchestrator.inputs import plan_of
    from orchestrator.report import plan_view
    from orchestrator.spec import load_spec

    planned = plan_of(load_spec(spec, overrides or ()), job=job, cluster_file=cluster, address=address)
    if as_json:
        print_json(planned)
    else:
        print_rich(plan_view(planned, explain=explain))


@app.command()
def sweep(
    spec: SpecPath,
    overrides: Overrides = None,
    output: Output = None,
    address: Address = None,
    dry_run: DryRun = False,
    require_promotion: RequirePromotion = False,
    as_json: JsonLines = False,
) -> None:
    """Search layers x learning rate, train the winner to the full budget, merge, verify, bundle."""
    loaded = _load(spec, overrides)
    if dry_run:
        _rehearse("sweep", loaded, output, address, as_json)
    else:
        _run("sweep", loaded, output, address, require_promotion, as_json)


@app.command()
def finetune(
    spec: SpecPath,
    overrides: Overrides = None,
    output: Output = None,
    address: Address = None,
    dry_run: DryRun = False,
    require_promotion: RequirePromotion = False,
    as_json: JsonLines = False,
) -> None:
    """Train the spec's one trial, merge, verify, bundle."""
    loaded = _load(spec, overrides)
    if dry_run:
        _rehearse("finetune", loaded, output, address, as_json)
    else:
        _run("finetune", loaded, output, address, require_promotion, as_json)


def _load(spec: Path, overrides: list[str] | None) -> LoadedSpec:
    from orchestrator.spec import load_spec

    return load_spec(spec, overrides or ())


def _rehearse(
    job: Literal["sweep", "finetune"], loaded: LoadedSpec, output: Path | None, address: str | None, as_json: bool
) -> None:
    """Check and print everything up to and including the plan."""
    from orchestrator.inputs import cluster_of
    from orchestrator.report import plan_view
    from orchestrator.runtime import rehearse

    rehearsal = rehearse(loaded, job, output=output, cluster=lambda: cluster_of(None, address))
    if as_json:
        print_json({"run": str(rehearsal.run_folder), "would": rehearsal.would, "plan": rehearsal.plan.model_dump(mode="json")})
        return
    print_rich(plan_view(rehearsal.plan))
    print(f"\ndry run: nothing was started and nothing was written; without --dry-run this would {rehearsal.would}")
    print(f"run       {rehearsal.run_folder}")


def _run(job: str, loaded: LoadedSpec, output: Path | None, address: str | None, require_promotion: bool, as_json: bool) -> None:
    from orchestrator.report import open_view

    view = open_view(json_lines=as_json, stream=sys.stdout if as_json else sys.stderr)
    view.phase("start", "loading libraries")
    from orchestrator.runtime import run_finetune, run_sweep
    from orchestrator.store.signals import handle_stop_signals

    handle_stop_signals()
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

    transfer = outcome.transfer
    try:
        transfer = transfer.model_copy(update={"report": str(write_report(outcome.run_folder))})
    except UsageError as error:  # the run itself is complete
        print(f"the report was not written: {error}", file=sys.stderr)
    if as_json:
        result = {"sweep": outcome.sweep.model_dump(mode="json"), "transfer": transfer.model_dump(mode="json")}
        print_json({"kind": "result", "run": str(outcome.run_folder), **result}, indent=None)
    else:
        print(printable_lines(final_screen(outcome.sweep, transfer)), flush=True)


def _report_what_there_is(loaded: LoadedSpec, output: Path | None) -> None:
    """Write the report of a run that failed late; it shows the failure."""
    from orchestrator.report.page import write_report
    from orchestrator.run.directory import output_root

    folder = output_root(loaded, output).path / loaded.spec.name
    if folder.is_dir():
        with contextlib.suppress(UsageError):
            print(f"report: {write_report(folder)}", file=sys.stderr)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    trial: Annotated[
        str | None, typer.Option("--trial", metavar="TRIAL", help="Another trial, by its number, its id, or the start of its id.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Promote this trial by hand; the run records it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a trial of a finished run into a verified bundle: the promoted one, or another that you promote by hand."""
    from orchestrator.report import open_view
    from orchestrator.run.reader import read_run

    read_run(run)
    from orchestrator.runtime import merge_trial

    view = open_view(json_lines=as_json, stream=sys.stdout if as_json else sys.stderr)
    _show_outcome(merge_trial(run, trial, promote=promote, view=view), as_json)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    base: Annotated[Path | None, typer.Option("--base", metavar="DIR", help="The base model's folder, if it has moved.")] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", metavar="FILE", help="The held-out documents, if they have moved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a bundle against its manifest, and the merged model against the trained one."""
    from orchestrator.serve import verify_bundle

    figures = verify_bundle(bundle, base=base, held_out=held_out)
    if as_json:
        print_json(figures)
    else:
        print_facts(figures)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    follow: Annotated[bool, typer.Option("--follow", help="Update it until the run ends; the page reloads itself.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write report.html from the run directory, finished or not."""
    from orchestrator.report.page import follow_run, write_report

    path = write_report(run)
    if as_json:
        print_json({"report": str(path)})
    else:
        print(printable(str(path)), flush=True)
    if follow:
        follow_run(run)


@app.command()
def doctor(address: Address = None, as_json: AsJson = False) -> None:
    """Check this machine: versions, memory, disk, GPUs, Ray; what is wrong, and how to fix it."""
    from orchestrator.this_machine import examine

    examination = examine(address)
    if as_json:
        print_json(examination.as_json())
    else:
        print_rich(examination.view())
    if examination.num_wrong:
        raise typer.Exit(UNEXPECTED)


app.command()(cli_init.init)
app.command()(cli_runs.runs)
app.command()(cli_runs.compare)
app.command()(cli_bundles.chat)
app.command()(cli_bundles.predict)
