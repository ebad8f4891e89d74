"""Text to render: sentences in the manner of running text, numbers, dollar amounts and percentages.

The proportions are those of GoogleFontsBench (https://arxiv.org/abs/2602.13889). Every text belongs to one split only,
and sentences of the test split are made of nouns, names, verbs and adjectives that no other split uses.
"""

import random
import zlib
from typing import Dict, List

__all__ = ['CHARACTERS', 'SPLITS', 'random_text']

SPLITS = ('train', 'val', 'test')
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:?!'-$%"  # a font must have them

_NAMES = """
Agnes Boris Clara Dmitri Elena Felix Greta Hugo Irene Jakob Katya Liam Mirka Nadia Oscar Priya Quentin Rosa Stefan
Tomas Ulrich Vera Wanda Xavier Yusuf Zelda Aaron Bianca Cyrus Dolores Edgar Farida Gustav Hilde Ivan Judith Karl Leonie
Matteo Nora Otto Petra Quinn Rufus Selma Theo Uma Viktor Willa Ximena Yvonne Zoltan
Antwerp Bergen Cordoba Dublin Esbjerg Fez Geneva Havana Izmir Jakarta Kyoto Lisbon Malta Nairobi Oslo Porto Quito Riga
Seville Tunis Utrecht Vienna Warsaw Xanten York Zagreb
January February March April May June July August September October November December
""".split()
_NOUNS = """
actor apple archive attic bakery balcony banjo barrel beacon bicycle blanket border bottle branch bridge bucket cabin
canal candle carpet castle ceiling cellar chapel chimney circus cliff clock cloud coffee comet copper corner cottage
cousin cricket curtain dancer desert diamond doctor drawer eagle editor elbow engine evening fabric farmer feather
ferry fiddle flame flower forest fossil fountain fox frost garden gate ghost glacier glove grain guitar hammer harbour
harvest hedge helmet hill honey horizon hotel iceberg index island ivory jacket jewel journey judge juice kettle king
kitchen kite ladder lake lantern lemon letter library lizard magnet market meadow melody merchant mirror mountain
museum needle neighbour notebook oak ocean office olive orchard oven owl oyster palace paper parcel pepper piano
pillow pilot planet pocket poem potter puzzle quarry queen quilt rabbit railway ribbon river rocket roof sailor salt
school shadow silver singer sparrow spoon station stone storm street summer table tailor teacher temple theatre tiger
timber tower train travel treasure tunnel turtle umbrella uncle valley velvet village violin visitor wagon wallet
water weather wheel whistle window winter wizard workshop writer yard yoghurt zebra zipper
""".split()
_VERBS = """
admired answered avoided baked bought broke built buried carried caught chased cleaned climbed collected copied counted
covered crossed described drew dropped enjoyed explored feared filled finished fixed followed forgot found gathered
guarded heard hid ignored invented joined kept kicked knew labelled left lifted loved measured mended missed moved
noticed opened ordered packed painted passed photographed polished praised pulled pushed questioned quoted raised
reached remembered repaired sank saved sketched sold solved stole studied swept tasted tested touched traded trimmed
unlocked used visited watched weighed wished wrapped wrote zoomed
""".split()
_ADJECTIVES = """
ancient amber ample awkward bitter blue brave brief bright broken busy calm careful cheap clever cold crooked curious
damp dark deep distant dusty eager early empty exact faint famous fierce flat foggy fresh frozen gentle giant glad
golden grand green grey happy heavy hidden hollow honest huge humble icy idle jolly keen kind large lazy little lively
lonely loud lucky mellow modern narrow neat noble noisy odd old open orange pale patient plain polite proud purple quick
quiet rapid rare red rough round rusty secret shallow sharp shy silent simple slow small smooth soft steep strange
strict sweet swift tall thin tidy tiny tough unusual vague vast violet warm weary wet white wide wild wise wooden
yellow young zealous
""".split()
_SENTENCES = (
    'The {a} {n} {v} the {n}.',
    'The {a} {n} {v} a {a} {n} near the {n}.',
    '{N} {v} the {n} and the {a} {n}.',
    '{N} and {N} {v} {d} {a} jars of {n}.',
    'In {N}, the {n} {v} every {a} {n} before noon.',
    'Why was it the {n} of {N} that {v} the {n}?',
    'My {a} {n} from {N} {v} the {n}; nobody knew why.',
    'What a {a} {n}!',
    'Nobody {v} the {n}, yet the {a} {n} {v} it.',
    'After {d} days {N} {v} the {a} {n} by the {n}.',
    'Was the {n} {a}?',
    'It was {N} who {v} our {n}, not the {a} {n}.',
    'They {v} the {n}: a {a} one, {a} and {a}.',
    "{N}'s {n} {v} the {n} quite well.",
    'Just then a {a}, {a} {n} {v} the {n} with joy.',
    'Half of the {n} was {a}, and the other half {v} {N}.',
    'Q: who {v} the {n}? A: {N}, the {a} {n}.',
    'Every {n} in {N} {v} its own {a} {n}.',
    '{N} {v} it.',
    'So the {n} {v} us, but {N} {v} the {a} {n} again and kept the {n}.',
)


def _vocabulary() -> Dict[bool, Dict[str, List[str]]]:
    """Words by kind, for the test split (True) and the others (False)."""
    vocabulary: Dict[bool, Dict[str, List[str]]] = {False: {}, True: {}}
    for kind, words in (('n', _NOUNS), ('N', _NAMES), ('v', _VERBS), ('a', _ADJECTIVES)):
        words = sorted(set(words))
        random.Random(0).shuffle(words)
        cut = len(words) // 5
        vocabulary[True][kind], vocabulary[False][kind] = words[:cut], words[cut:]
    return vocabulary


_VOCABULARY = _vocabulary()


def _sentence(split: str, rng: random.Random) -> str:
    words = _VOCABULARY[split == 'test']
    text = ''
    while not 20 <= len(text) <= 100:
        text = rng.choice(_SENTENCES)
        for kind in ('n', 'N', 'v', 'a'):
            while f'{{{kind}}}' in text:
                text = text.replace(f'{{{kind}}}', rng.choice(words[kind]), 1)
        text = text.replace('{d}', str(rng.randrange(2, 1000)))
    return text


def _number(rng: random.Random) -> str:
    value = 10 ** rng.uniform(1, 7)
    return f'{value:,.{rng.choice((0, 0, 1, 2))}f}'


def _candidate(split: str, index: int, rng: random.Random) -> str:
    kind = index % (23 if split == 'train' else 8)  # 25 of 575 and 5 of 40 of each kind but sentences
    if kind == 0:
        return _number(rng)
    if kind == 1:
        return f'${_number(rng)}'
    if kind == 2:
        return f'{rng.uniform(0, 100):.{rng.choice((1, 2, 3))}f}%'
    return _sentence(split, rng)


def random_text(split: str, index: int, rng: random.Random) -> str:
    """A text of the split.

    Args:
        split: 'train', 'val' or 'test'.
        index: Number of the image within its class, which decides between sentence, number, dollars and percentage: one
            in 23 of the latter three each in training, one in 8 in the others.
        rng: Source of everything else.

    Returns:
        Text of `CHARACTERS` and spaces, a sentence of 20 to 100 characters or a number.
    """
    while True:
        text = _candidate(split, index, rng)
        # the text itself says which split it belongs to: a tenth each to val and test
        if SPLITS[{0: 1, 1: 2}.get(zlib.crc32(text.encode()) % 10, 0)] == split:
            return text
