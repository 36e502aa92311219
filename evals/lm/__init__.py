"""Long-context accuracy with lm-evaluation-harness, dense and pruned on the same samples; see evals/README.md."""
