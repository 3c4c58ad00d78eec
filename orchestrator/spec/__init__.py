"""The spec: the user's request, one YAML file as frozen values.

    loaded = load_spec("jobs/specs/quickstart.yaml")    # or SpecError: every mistake with file:line:column
    load_spec("spec.yaml", ["search.trials=4"])         # with overrides, as `--set` gives them
    loaded.spec.train.epochs                            # the values as written, nothing derived
    loaded.resolve(loaded.spec.output)                  # paths are relative to the spec's file
    spec_sha256(loaded.spec, "sweep")                   # the run's identity

`json_schema()` describes every key, `dump_yaml` prints the resolved spec, `parse_policy` parses a layer policy, `UNSUPPORTED`
lists what is rejected because it is not implemented yet.
"""

from orchestrator.spec.loader import LoadedSpec, load_spec, load_values, require_section
from orchestrator.spec.models import JobSpec
from orchestrator.spec.policy import Policy, normal_form, parse_policy
from orchestrator.spec.render import describe_difference, dump_yaml, json_schema, learning_rate_range, spec_sha256
from orchestrator.spec.unsupported import UNSUPPORTED

__all__ = [
    "UNSUPPORTED",
    "JobSpec",
    "LoadedSpec",
    "Policy",
    "describe_difference",
    "dump_yaml",
    "json_schema",
    "learning_rate_range",
    "load_spec",
    "load_values",
    "normal_form",
    "parse_policy",
    "require_section",
    "spec_sha256",
]
