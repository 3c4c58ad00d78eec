"""`python -m orchestrator.probe QUESTION.json ANSWER.json`"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from orchestrator.anatomy.learning import Question
from orchestrator.probe.learn import answer


def main(question: Path, answered: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = answer(Question.model_validate_json(question.read_bytes()))
    answered.write_text(found.model_dump_json(exclude_defaults=True))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
