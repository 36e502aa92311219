"""What the task files of evals/tasks/ are filled with: prompts made on this machine, from a seed, for any tokenizer."""
