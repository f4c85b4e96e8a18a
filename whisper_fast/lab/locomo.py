"""LoCoMo's conversations (Maharana et al. 2024): turns to remember, and questions with the turns that answer them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Conversation", "Question", "conversations"]

SESSION = re.compile(r"session_(\d+)")
TURN_ID = re.compile(r"D:?(\d+):(\d+)")
TIME: Final = "%I:%M %p on %d %B, %Y"


class Question(msgspec.Struct, frozen=True):
    """A question and the ids of the turns that hold its answer, at least one."""

    text: str
    evidence: frozenset[str]

    def recall(self, found: Iterable[str]) -> float:
        """Return the share of the evidence among the turns that were found."""
        return len(self.evidence.intersection(found)) / len(self.evidence)


class Conversation(msgspec.Struct, frozen=True):
    """A conversation of many sessions; each turn is what `MemoryStore.add_many` takes, its id is its `source`."""

    name: str
    turns: tuple[dict[str, Any], ...]
    questions: tuple[Question, ...]


def conversations(folder: Path) -> list[Conversation]:
    """Read every conversation in `folder`, none if there is none; questions without usable evidence are left out."""
    return [conversation(path) for path in sorted(folder.glob("*.json"))]


def conversation(path: Path) -> Conversation:
    data = msgspec.json.decode(path.read_bytes())
    said = tuple(turns(data))
    known = {turn["source"] for turn in said}
    asked = (Question(q["question"], evidence(q.get("evidence", ())) & known) for q in data["qa"])
    return Conversation(path.stem, said, tuple(question for question in asked if question.evidence))


def turns(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    numbers = sorted(int(match[1]) for key in data if (match := SESSION.fullmatch(key)))
    for session in (f"session_{number}" for number in numbers):
        at = datetime.strptime(data[f"{session}_date_time"], TIME).replace(tzinfo=UTC)
        for turn in data[session]:
            yield {
                "text": turn["text"],
                "speaker": turn["speaker"],
                "session": session,
                "at": at,
                "source": turn["dia_id"],
            }


def evidence(given: Iterable[str]) -> frozenset[str]:
    """Return the turn ids in `given`, whose entries are now and then two in one, or misspelt."""
    return frozenset(f"D{int(session)}:{int(turn)}" for text in given for session, turn in TURN_ID.findall(text))
