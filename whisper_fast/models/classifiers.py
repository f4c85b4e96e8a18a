"""What a language model may be asked about a text: its emotion, the trust in it, its topic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ..errors import DeadlineExceeded, LLMError, Overloaded
from ..llm.packing import Control, Task

if TYPE_CHECKING:
    from ..llm.packing import Classifier, PackingStats
    from ..message import Message
    from .emotion import EmotionModel

__all__ = ["EMOTION", "TOPIC", "TRUST", "Feeling", "LLMEmotion", "Topic", "Trust"]

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Feeling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text's emotion: `valence` from -1 (bad) to 1 (good), the others their strength from 0 to 1."""

    valence: Annotated[float, msgspec.Meta(ge=-1, le=1)]
    joy: Share = 0.0
    sadness: Share = 0.0
    anger: Share = 0.0
    fear: Share = 0.0


class Trust(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the writer trusts the one who is spoken to: 0 not at all, 1 entirely."""

    trust: Share


class Topic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a text is about."""

    topic: Literal["family", "friends", "love", "work", "school", "health", "money", "leisure", "world", "other"]


EMOTION = Task(
    "emotion",
    "Say which emotion the writer of a text shows: valence from -1 (bad) to 1 (good), joy, sadness, anger and fear "
    "from 0 to 1.",
    Feeling,
    (
        Control("What a wonderful day, I am so happy!", lambda feeling: feeling.valence > 0.2),
        Control("This is terrible, I hate everything about it.", lambda feeling: feeling.valence < -0.2),
    ),
)

TRUST = Task(
    "trust",
    "Say how far the writer of a text trusts the one who is spoken to, from 0 (not at all) to 1 (entirely).",
    Trust,
    (
        Control("I can tell you everything, I know you keep my secrets.", lambda answer: answer.trust > 0.5),
        Control("You lie to me all the time, I do not believe a word.", lambda answer: answer.trust < 0.5),
    ),
)

TOPIC = Task(
    "topic",
    "Say what a text is about.",
    Topic,
    (
        Control("My boss moved the project deadline to Friday.", lambda answer: answer.topic == "work"),
        Control("The dentist says the tooth must come out.", lambda answer: answer.topic == "health"),
    ),
)


class LLMEmotion:
    """The emotion as the language model sees it; where it does not answer in `seconds`, as the lexicon does."""

    def __init__(self, classifier: Classifier[Feeling], lexicon: EmotionModel, seconds: float) -> None:
        self._classifier = classifier
        self._lexicon = lexicon
        self._seconds = seconds
        self.fallbacks = 0

    async def analyse(self, message: Message) -> dict[str, float]:
        """Return named values of its text's emotion, with "valence" from -1 (bad) to 1 (good) among them."""
        try:
            found = await self._classifier.classify(
                message.text, user=message.user, priority=message.priority, timeout=self._seconds
            )
        except (LLMError, DeadlineExceeded, Overloaded):
            self.fallbacks += 1
            return self._lexicon.analyse(message.text)
        return msgspec.structs.asdict(found)

    def stats(self) -> dict[str, int]:
        """Return the classifier's counters, and how often the lexicon stood in."""
        counted: PackingStats = self._classifier.stats()
        return {**msgspec.structs.asdict(counted), "fallbacks": self.fallbacks}

    async def close(self) -> None:
        """Take no more texts."""
        await self._classifier.close()
