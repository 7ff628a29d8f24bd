"""Exports to formats that other software reads, and imports from them."""
