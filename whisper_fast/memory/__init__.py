"""Per-user memory: segments, recall and the store over them."""
