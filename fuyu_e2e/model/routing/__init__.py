"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): blocks that process only some tokens."""
