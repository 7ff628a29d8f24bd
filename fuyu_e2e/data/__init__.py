"""From files to packed batches: documents, images, tokenizer, sequences, packing, and streams of shards."""
