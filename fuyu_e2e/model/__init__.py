"""The decoder: configuration, attention, blocks and what they cost.

Knows nothing of files, Lightning or tokenizers: it takes a PackedBatch and gives logits or a loss.

Axes. A capital letter in a tensor's name (`x_TD`) or in a shape annotation means the same in all of `model`:

    T   tokens of a packed row              H   query heads
    U   tokens that a block selects         G   key/value heads
    Q   queries, of any tokens              K   values of a head
    S   keys and values attended to         R   values of a head that rotary positions turn
    Y   supervised tokens                   V   vocabulary
    D   width of the decoder                P   patches
    N   embeddings of images                C   values of a patch: side x side x 3
    L   newline tokens of images            F   features of images, that blocks may attend to
    B   batch: sequences decoded together,  W   width of these features
        or documents padded alike

An axis that only one function has is a word (`padded`, `bins`).
"""
