"""Recipes and command lines: reads and checks settings, and passes them to Lightning."""
