"""Models that run in the process: the text embedder and the emotion analysis."""
