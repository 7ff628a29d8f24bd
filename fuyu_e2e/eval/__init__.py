"""Tasks and metrics: what a model is asked, how the answer is scored, and pictures of it."""
