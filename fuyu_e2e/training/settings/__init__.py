"""Recipes and command lines: how settings are read, checked and handed to Lightning."""
