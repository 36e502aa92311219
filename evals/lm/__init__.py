"""Long-context accuracy with lm-evaluation-harness, dense and pruned on the same samples; see evals/README.md."""

import evals.provenance  # noqa: F401  puts scripts/ on the path
