"""The language model: one provider, one pool over many, one simulated model."""
