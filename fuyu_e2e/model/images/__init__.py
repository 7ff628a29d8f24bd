"""Connectors, which turn images into embeddings, one a file; and options that apply after any of them."""

from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.images.mlp import MLPConfig

__all__ = ["LinearConfig", "MLPConfig"]
