"""Generators of tasks: pictures with questions or texts, written as shards."""
