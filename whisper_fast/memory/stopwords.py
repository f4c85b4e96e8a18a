"""English words that say nothing about what a text is about."""

from __future__ import annotations

from typing import Final

__all__ = ["STOP_WORDS"]

PLAIN = """
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each few for from further had has have having he her here hers herself him
himself his how i if in into is it its itself just me might more most must my myself no nor not now of off on once
only or other ought our ours ourselves out over own same shall she should so some such than that the their theirs
them themselves then there these they this those through to too under until up very was we were what when where which
while who whom why will with would you your yours yourself yourselves
"""
SHORTENED = """
aren't can't cannot couldn't didn't doesn't don't hadn't hasn't haven't he'd he'll he's here's how's i'd i'll i'm i've
isn't it's let's mustn't shan't she'd she'll she's shouldn't that's there's they'd they'll they're they've wasn't we'd
we'll we're we've weren't what's when's where's who's why's won't wouldn't you'd you'll you're you've
"""

HASTY = """
arent cant couldnt didnt doesnt dont hadnt hasnt havent im isnt ive lets thats theres theyre wasnt whats wont wouldnt
youre youve
"""

STOP_WORDS: Final = frozenset(f"{PLAIN} {SHORTENED} {HASTY}".split())
