"""Stories on six topics that share nearly all of their words, and how well they can be foretold.

A story opens with a time and a place, "one night near the harbor ,", which together make its topic;
no word tells it. Four sentences follow, "the fox carried the golden kettle .". A word tells its
group, and its group which groups are likely next: that is what topics differ in.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

TIMES = {"day": "morning noon summer spring", "night": "night evening winter midnight"}
PLACES = {
    "sea": "harbor beach island lighthouse",
    "forest": "forest river mountain meadow",
    "town": "market castle bakery station",
}
GROUPS = {
    "hero": (
        "fox wolf bear hare badger otter",
        "king queen prince princess knight page",
        "baker cook miller butcher farmer gardener",
        "girl boy child twin baby pupil",
        "sailor captain pirate fisher diver rower",
        "witch wizard fairy giant dwarf ghost",
        "robin owl raven swan goose sparrow",
        "teacher doctor judge mayor priest clerk",
        "aunt uncle mother father sister brother",
        "singer dancer painter poet actor juggler",
    ),
    "verb": (
        "carried lifted dragged pushed pulled hauled",
        "painted drew sketched carved shaped colored",
        "ate tasted chewed swallowed nibbled licked",
        "lost dropped forgot misplaced broke spilled",
        "found spotted noticed discovered met saw",
        "sold bought traded lent borrowed rented",
        "washed cleaned brushed polished dusted rinsed",
        "hid buried covered locked wrapped guarded",
        "wanted wished loved missed needed admired",
        "mended built fixed made sewed tied",
    ),
    "adjective": (
        "red blue green yellow purple orange",
        "big huge large tall wide long",
        "tiny small little short narrow thin",
        "old ancient dusty worn rusty faded",
        "golden silver shiny bright glowing sparkling",
        "soft warm woolly cozy fluffy gentle",
        "cold wet icy frozen damp snowy",
        "sweet sour salty bitter spicy fresh",
        "strange secret magic odd hidden curious",
        "heavy hard strong solid sharp rough",
    ),
    "thing": (
        "kettle pot pan bowl cup plate",
        "apple pear plum cherry grape peach",
        "hat coat scarf glove boot shirt",
        "boat cart wagon sled raft bicycle",
        "lantern candle lamp torch mirror clock",
        "book letter map diary pencil stamp",
        "rope chain ladder hammer nail needle",
        "drum flute harp bell horn fiddle",
        "chair table bed bench shelf box",
        "stone shell feather leaf flower seed",
    ),
}
IN_GROUP = (0.6, 0.2, 0.1, 0.05, 0.03, 0.02)  # chances of the words of a group
LIKELY = 0.9  # chance of the likely next group; the other one has the rest
SENTENCES = 4
OPENING, SENTENCE = 6, 7  # words
WORLD = 7  # seed of what topics are about: the same in all runs


class Storyteller:
    """Knows the topics and tells stories on them."""

    def __init__(self) -> None:
        times, places = ([w.split() for w in words.values()] for words in (TIMES, PLACES))
        self.topics = [f"{place}_{time}" for time in TIMES for place in PLACES]
        self.groups = [[group.split() for group in groups] for groups in GROUPS.values()]
        lists = [["one", "near", "the", ",", "."], *times, *places, *chain(*self.groups)]
        self.words = [word for words in lists for word in words]
        index = {word: i for i, word in enumerate(self.words)}
        self._index = index
        self._openings = [
            ([index[w] for w in time], [index[w] for w in place])
            for time in times
            for place in places
        ]
        # ids of the words of each part of speech, [parts, groups, words of a group]
        self._ids = np.array([[[index[w] for w in g] for g in part] for part in self.groups])
        parts, count, _ = self._ids.shape
        draws = np.random.default_rng(WORLD)
        # chances of the next group, [topics, parts, groups, groups]; the last leads to a new hero
        self._next = np.zeros((len(self.topics), parts, count, count))
        self._first = np.zeros((len(self.topics), count))
        rows = np.arange(count)
        for topic in range(len(self.topics)):
            self._first[topic, draws.permutation(count)[:3]] = 0.6, 0.3, 0.1
            for part in range(parts):
                likely = draws.permutation(count)
                other = np.roll(likely, draws.integers(1, count))
                self._next[topic, part, rows, likely] = LIKELY
                self._next[topic, part, rows, other] = 1 - LIKELY

    @property
    def length(self) -> int:
        """Words of a story."""
        return OPENING + SENTENCES * SENTENCE

    def tell(self, topic: int, count: int, draws: np.random.Generator) -> NDArray[np.int64]:
        """So many stories on a topic, ids of words `[count, length]`."""
        index, (times, places) = self._index, self._openings[topic]
        stories = np.empty((count, self.length), np.int64)
        opening = ["one", "night", "near", "the", "beach", ","]
        stories[:, :OPENING] = [index[word] for word in opening]
        stories[:, 1], stories[:, 4] = draws.choice(times, count), draws.choice(places, count)
        group = _pick(np.broadcast_to(self._first[topic], (count, len(self._first[0]))), draws)
        for start in range(OPENING, self.length, SENTENCE):
            frame = ["the", "", "", "the", "", "", "."]
            stories[:, start : start + SENTENCE] = [index.get(word, 0) for word in frame]
            for part, place in enumerate((1, 2, 4, 5)):
                which = draws.choice(len(IN_GROUP), count, p=IN_GROUP)
                stories[:, start + place] = self._ids[part, group, which]
                group = _pick(self._next[topic, part, group], draws)
        return stories

    def entropy(self, topic: int) -> float:
        """Of stories on a topic after their opening, in nats for each word: no loss is below it.

        It is exact: a word tells its group, so what came before says no more of what comes next.
        The chances of groups are followed through the story.
        """
        within = _entropy(np.array(IN_GROUP))
        chances, total = self._first[topic], _entropy(self._first[topic])
        for step in range(SENTENCES * 4):
            total += within
            table = self._next[topic, step % 4]
            if step < SENTENCES * 4 - 1:
                total += float(chances @ np.array([_entropy(row) for row in table]))
            chances = chances @ table
        return total / (self.length - OPENING)


def _pick(chances: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.int64]:
    """An index for each row of chances."""
    picked = (chances.cumsum(1) < draws.random((len(chances), 1))).sum(1)
    return np.asarray(np.minimum(picked, chances.shape[1] - 1), np.int64)


def _entropy(chances: NDArray[np.float64]) -> float:
    """In nats."""
    known = chances[chances > 0]
    return float(-(known * np.log(known)).sum())
