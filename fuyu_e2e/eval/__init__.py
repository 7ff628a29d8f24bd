"""Tasks and metrics: questions to a model, scores of its answers, and pictures of both."""
