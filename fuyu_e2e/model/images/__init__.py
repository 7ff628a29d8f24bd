"""What turns an image into embeddings at its tokens: connectors, and options after any of them."""
