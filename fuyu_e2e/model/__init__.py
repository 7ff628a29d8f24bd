"""The decoder: configuration, attention, blocks and what they cost.

Knows nothing of files, Lightning or tokenizers: it takes a PackedBatch and gives logits or a loss.

Axes in tensor names: T packed tokens, P patches, C values of a patch, N embeddings of images, S supervised tokens,
D width, H query heads, G key/value heads, K head size, F feed-forward width, V vocabulary.
"""
