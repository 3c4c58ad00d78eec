"""From one YAML file to a verified, domain-tuned model: plan, search, refit, merge, verify, bundle.

The rooms, from the ground up: `spec` (what was asked), `anatomy` (what the base is), `plan` (what will be done),
`transfer` (what the figures mean), `store`, `data`, `train`, `serve` (what happens), `runtime` (Ray), `report`, `cli`.
"""

__version__ = "0.1.0"
