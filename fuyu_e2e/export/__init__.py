"""Out of the trainer: the layouts that other software reads."""
