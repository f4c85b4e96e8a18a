"""Truth on disk: one SQLite file, one writer thread, group commit."""
