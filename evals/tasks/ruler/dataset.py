"""The functions that the YAML files of this folder name."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # `lm_eval --include_path` is run from anywhere
    sys.path.append(str(ROOT))

from evals.tasks.generators.datasets import dataset  # noqa: E402

niah_single_1 = partial(dataset, "niah_single_1")
niah_single_2 = partial(dataset, "niah_single_2")
niah_single_3 = partial(dataset, "niah_single_3")
niah_multikey_1 = partial(dataset, "niah_multikey_1")
niah_multikey_2 = partial(dataset, "niah_multikey_2")
niah_multikey_3 = partial(dataset, "niah_multikey_3")
niah_multivalue = partial(dataset, "niah_multivalue")
niah_multiquery = partial(dataset, "niah_multiquery")
vt = partial(dataset, "vt")
cwe = partial(dataset, "cwe")
fwe = partial(dataset, "fwe")
qa_1 = partial(dataset, "qa_1")
qa_2 = partial(dataset, "qa_2")
