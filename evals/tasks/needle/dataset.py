"""The functions that the YAML files of this folder name."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # `lm_eval --include_path` is run from anywhere
    sys.path.append(str(ROOT))

from evals.needle.prompts import starts_with_answer  # noqa: E402
from evals.tasks.generators.datasets import dataset  # noqa: E402

single = partial(dataset, "needle_single")
multikey = partial(dataset, "needle_multikey")
multiquery = partial(dataset, "needle_multiquery")
variable = partial(dataset, "needle_variable")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the completion starts with the answer, under the prompt's length as the harness's RULER does."""
    return {str(doc["max_length"]): float(starts_with_answer(results[0], doc["outputs"][0]))}
