"""`python -m whisper_fast` is the command `whisper-fast`."""

from __future__ import annotations

from .cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
