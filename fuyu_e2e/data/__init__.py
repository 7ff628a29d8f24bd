"""From files to packed batches: documents, images, the tokenizer, sequences, packing, and streams of shards."""
