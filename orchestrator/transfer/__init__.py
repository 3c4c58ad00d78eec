"""Scores, paired comparisons, the verdict, the Pareto front and the promotion.

    score(metric, higher_is_better, forgetting(retain, base_retain), bound)     what the search minimises
    vs_none = paired_comparison(tuned_losses, base_losses, tokens, seed)        positive: tuned is better
    by_seed = over_seeds(seeds, gains)                                          mean and interval over trainings
    verdict(vs_none, others={"head": vs_head}, over_seeds=by_seed).sentence
    promote(trials, base, max_forgetting).trial_id

Pure functions of numbers; `records.py` holds what is written to sweep.json and transfer.json.
"""

from orchestrator.transfer.comparison import Comparison, between_trained, paired_comparison
from orchestrator.transfer.correlation import Correlation, rank_correlation
from orchestrator.transfer.memory import memory_rows
from orchestrator.transfer.promotion import Promotion, pareto_front, promote
from orchestrator.transfer.scoring import FORGETTING_WEIGHT, SMALLEST_GAIN, WORST_SCORE, forgetting, score
from orchestrator.transfer.seeds import OverSeeds, over_seeds
from orchestrator.transfer.verdicts import Verdict, verdict

__all__ = [
    "FORGETTING_WEIGHT",
    "SMALLEST_GAIN",
    "WORST_SCORE",
    "Comparison",
    "Correlation",
    "OverSeeds",
    "Promotion",
    "Verdict",
    "between_trained",
    "forgetting",
    "memory_rows",
    "over_seeds",
    "paired_comparison",
    "pareto_front",
    "promote",
    "rank_correlation",
    "score",
    "verdict",
]
