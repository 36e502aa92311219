"""A live server under random traffic and faults: `python -m evals.soak --help`."""
