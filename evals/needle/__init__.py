"""The needle model: a tiny decoder that really retrieves, its training and its prompts."""
