"""Models on disk: checkpoints of a run, exported folders, and how to read both without running their content."""
