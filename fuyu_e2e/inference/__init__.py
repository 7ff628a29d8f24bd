"""Generation: the key/value cache, sampling, and batched prompts."""
