"""What a story is called and how its shots are told: captions, and the words they are made of.

People name the looks of a character once and then say "the bear". The captions do the same, so that
everything after the first mention has to come from memory; a share of stories never names the looks at all.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from shotstream.storybook.world import Character, ShotScript, World

Naming = tuple[frozenset[str], ...]
"""Per character of the cast, the attributes ("colour", "hat") that have been named."""

STYLES = {"first": 0.60, "global": 0.25, "never": 0.15}
"""Where a story names colour and hat: with the first appearance, in the global caption, nowhere."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?", text.lower().replace("\u2019", "'"))


STOP_WORDS = frozenset(
    _words(
        """a an the and or of in on at by to up with from into for about around through under over as is are
        was has have it its it's he she him her his they them their we us our you your i this that these those
        there here where who which while then one wearing wears"""
    )
)
"""Words that carry nothing the model needs; `tokenize` drops them."""

SPECIES_WORDS = {
    "cat": ("cat", "kitten", "kitty"),
    "bear": ("bear", "teddy"),
    "bunny": ("bunny", "rabbit", "hare"),
    "frog": ("frog", "toad"),
    "duck": ("duck", "duckling"),
}
COLOUR_WORDS = {
    "red": ("red", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
}
HAT_PHRASES = {
    "none": ("without a hat", "with no hat", "without a hat"),
    "crown": ("in a crown", "with a crown", "wearing a crown"),
    "cap": ("in a cap", "with a cap", "wearing a cap", "in a baseball cap"),
    "tophat": ("in a top hat", "with a top hat", "wearing a tophat", "in a tall hat"),
}
PLACE_PHRASES = {
    "meadow": ("in the meadow", "in a meadow", "in the field", "on the grass"),
    "beach": ("on the beach", "at the beach", "by the sea", "at the seaside", "on the shore"),
    "forest": ("in the forest", "in a forest", "in the woods", "among the trees"),
    "city": ("in the city", "in the city", "in the town", "in the street"),
    "desert": ("in the desert", "in a desert", "by the cactus", "in the dunes"),
    "snow": ("in the snow", "in the snow", "in the snowy mountains", "in winter"),
}
TIME_PHRASES = {
    "day": (
        "by day",
        "during the day",
        "on a sunny day",
        "in daylight",
        "in the daytime",
        "in the afternoon",
    ),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening", "as the sun sets"),
    "night": ("at night", "at night", "by night", "in the moonlight", "at midnight", "under the stars"),
}
FRAMING_PHRASES = {
    "wide": ("a wide shot", "a wide shot", "a wide view", "a long shot", "a distant view"),
    "medium": ("a medium shot", "a medium shot", "a medium view", "a mid shot", "a full shot"),
    "close": ("a close-up", "a close-up", "a close shot", "a closeup", "a portrait", "a tight shot"),
}
ACTION_FORMS = {  # they ..., he ..., of him ...
    "walk": (
        ("walk", "walks", "walking"),
        ("stroll", "strolls", "strolling"),
        ("wander", "wanders", "wandering"),
        ("go for a walk", "goes for a walk", "going for a walk"),
    ),
    "jump": (
        ("jump", "jumps", "jumping"),
        ("hop", "hops", "hopping"),
        ("leap", "leaps", "leaping"),
        ("bounce", "bounces", "bouncing"),
    ),
    "wave": (
        ("wave", "waves", "waving"),
        ("wave hello", "waves hello", "waving hello"),
        ("say hello", "says hello", "saying hello"),
        ("greet us", "greets us", "greeting us"),
    ),
    "sit": (
        ("sit", "sits", "sitting"),
        ("sit down", "sits down", "sitting down"),
        ("rest", "rests", "resting"),
    ),
    "dance": (
        ("dance", "dances", "dancing"),
        ("sway", "sways", "swaying"),
        ("dance to music", "dances to music", "dancing to music"),
    ),
    "look": (
        ("look around", "looks around", "looking around"),
        ("gaze around", "gazes around", "gazing around"),
        ("watch", "watches", "watching"),
        ("stand still", "stands still", "standing still"),
    ),
}
GLOBAL_FRAMES = (
    "a story about {}",
    "a story about {}",
    "a tale of {}",
    "the adventures of {}",
    "a picture book about {}",
    "a cartoon with {}",
)
SHOT_FRAMES = (
    "{framing} of {who} {doing} {place} {time}",
    "{framing} of {who} {doing} {place} {time}",
    "{framing}: {who} {does} {place} {time}",
    "{time}, {who} {does} {place}, {framing}",
    "{place} {time}, {who} {does}, {framing}",
    "{who} {does} {place} {time}, {framing}",
)
SYNONYM_RATE, NO_ARTICLE_RATE, PRONOUN_RATE, BARE_HEAD_RATE, TOGETHER_RATE = 0.2, 0.15, 0.12, 0.5, 0.3


@dataclass(frozen=True)
class Captions:
    """The text of a story; `named[k]` is what has been named of each character up to shot k."""

    global_caption: str
    shots: tuple[str, ...]
    named: tuple[Naming, ...]


def captions(world: World, seed: int = 0) -> Captions:
    """One telling of a story, always the same for a seed; other seeds choose other words and styles."""
    random = Random(f"storybook captions {seed} {world.split} {world.seed} {len(world.shots)}")
    style = random.choices(list(STYLES), list(STYLES.values()))[0]
    named: list[set[str]] = [set() for _ in world.cast]
    words = [_word(random, SPECIES_WORDS[who.species]) for who in world.cast]
    leads = [
        _introduce(random, who, word, seen, style == "global")
        for who, word, seen in zip(world.cast, words, named, strict=True)
    ]
    opening = _articles(random, random.choice(GLOBAL_FRAMES).format(" and ".join(leads)))
    told: list[str] = []
    namings: list[Naming] = []
    met: set[int] = set()
    for shot in world.shots:
        told.append(_shot_caption(random, world, shot, words, named, met, style == "first"))
        met.update(shot.cast)
        namings.append(tuple(frozenset(seen) for seen in named))
    return Captions(opening, tuple(told), tuple(namings))


def _shot_caption(
    random: Random,
    world: World,
    shot: ShotScript,
    words: Sequence[str],
    named: Sequence[set[str]],
    met: set[int],
    naming: bool,
) -> str:
    frame, several = random.choice(SHOT_FRAMES), len(shot.cast) > 1
    if len(world.cast) == 1 and met and "{does}" in frame and random.random() < PRONOUN_RATE:
        who = random.choice(("he", "she", "it"))
    else:
        people = [
            _introduce(random, world.cast[index], words[index], named[index], True)
            if naming and index not in met
            else f"{random.choice(('a', 'the'))} {words[index]}"
            for index in shot.cast
        ]
        who = " and ".join(people)
    plural, singular, doing = random.choice(ACTION_FORMS[shot.action])
    extra = " together" if several and random.random() < TOGETHER_RATE else ""
    text = frame.format(
        framing=_phrase(random, FRAMING_PHRASES, shot.framing),
        who=f"both {who}" if several and not extra and random.random() < TOGETHER_RATE else who,
        doing=doing + extra,
        does=(plural if several else singular) + extra,
        place=_phrase(random, PLACE_PHRASES, shot.place),
        time=_phrase(random, TIME_PHRASES, shot.time),
    )
    return _articles(random, text)


def _introduce(random: Random, who: Character, word: str, named: set[str], looks: bool) -> str:
    """ "a bear", or with its looks: "a green bear in a crown"; notes what it names."""
    if not looks:
        return f"a {word}"
    named.add("colour")
    text = f"a {_word(random, COLOUR_WORDS[who.colour])} {word}"
    if who.hat == "none" and random.random() < BARE_HEAD_RATE:
        return text
    named.add("hat")
    return f"{text} {random.choice(HAT_PHRASES[who.hat])}"


def _word(random: Random, words: Sequence[str]) -> str:
    """The plain word, or now and then one of its synonyms."""
    return random.choice(words[1:]) if random.random() < SYNONYM_RATE else words[0]


def _phrase(random: Random, phrases: Mapping[str, Sequence[str]], value: str) -> str:
    return random.choice(phrases[value])


def _articles(random: Random, text: str) -> str:
    """Put "an" where it belongs, or leave all articles out, as people do in notes."""
    if random.random() < NO_ARTICLE_RATE:
        return re.sub(r"\b(a|the) ", "", text)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


# Words


def tokenize(text: str) -> list[str]:
    """The content words of a text in order, in lower case, without punctuation; unknown words stay."""
    return [word for word in _words(text) if word not in STOP_WORDS]


def unknown_words(text: str) -> list[str]:
    """The words of a text that the storybook model has never read, each once, in order."""
    return [word for word in dict.fromkeys(tokenize(text)) if word not in VOCABULARY]


def _all_phrases() -> list[str]:
    tables = (SPECIES_WORDS, COLOUR_WORDS, HAT_PHRASES, PLACE_PHRASES, TIME_PHRASES, FRAMING_PHRASES)
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    phrases += [form for verbs in ACTION_FORMS.values() for forms in verbs for form in forms]
    return [*phrases, "both together", *(frame.replace("{}", "") for frame in GLOBAL_FRAMES)]


VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in _all_phrases() for word in tokenize(phrase)}))
"""Every content word a caption can contain, sorted; its order is the order of the model's embeddings."""
