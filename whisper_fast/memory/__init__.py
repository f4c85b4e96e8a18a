"""Per-user memory: what was told, found again by words, meaning and neighbourhood.

store      MemoryStore: the public face; truth in SQLite, segments in a bounded cache
pending    memories on their way to the disk
segment    one user's memories in memory: vectors, postings, texts
item       what may be handed in, checked
rows       the SQL
embedding  texts to vectors
index      one user's approximate index, above the size where it wins (indexing: which users have one)
reembedding  old memories get vectors of the present embedder
chroma     the same calls over a Chroma server
intake     memories from elsewhere
terms      texts to stems (stopwords: those that say nothing)
scopes     who may hear what was told where
"""

from __future__ import annotations

from ..message import Recalled
from .store import MemoryStore

__all__ = ["MemoryStore", "Recalled"]
