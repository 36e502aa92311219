"""A live server under random traffic and faults: `python -m evals.soak --help`."""

import evals.provenance  # noqa: F401  puts scripts/ on the path
