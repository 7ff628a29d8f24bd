"""From webdataset shards to packed rows. Knows nothing of models."""
