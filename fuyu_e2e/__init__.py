"""Train a multimodal decoder with no vision encoder, end to end: one sequence of raw patches and text."""

__version__ = "0.1.0"
