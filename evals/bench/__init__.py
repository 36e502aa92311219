"""The benchmark of the fork: `make bench`, or `python -m evals.bench --help`."""
