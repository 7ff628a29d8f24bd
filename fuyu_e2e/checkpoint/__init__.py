"""What lies on disk of a model: checkpoints of a run, exported folders, and how to read them without running them."""
