"""Attention within documents: its mask, its definition, and the backends that compute it."""
