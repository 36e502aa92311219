"""The benchmark of the fork: `make bench`, or `python -m evals.bench --help`."""

import evals.provenance  # noqa: F401  puts scripts/ on the path
