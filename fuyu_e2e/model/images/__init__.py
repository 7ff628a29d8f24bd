"""What turns images into embeddings: connectors, each a file, and options after any of them."""

from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.images.mlp import MLPConfig

__all__ = ["LinearConfig", "MLPConfig"]
