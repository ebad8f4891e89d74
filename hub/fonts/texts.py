"""Text to train and validate on: running prose cut anywhere, made-up words, capitals, names, single words, numbers.

Every piece belongs to one split only: a fifth of the vocabulary, of the made-up words and of the numbers is kept for
validation. The texts of hub/fonts/protocol.py, chromium.py and pango.py come from elsewhere.
"""

import random
import zlib
from typing import Callable, Dict, List

__all__ = ['CHARACTERS', 'KINDS', 'NUMBERS', 'SPLITS', 'random_kind', 'random_text']

SPLITS = ('train', 'val')
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:?!'-$%"  # a font must have them
_MARKS = '()/&"#*+@=\u2013\u2014\u2026\u201c'  # most fonts have these too; what a font lacks is left out

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


_ONSETS = """
b br c ch cl cr d dr f fl fr g gl gr h j k kn l m n p ph pl pr qu r s sc sh sk sl sm sp st str sw t th tr tw v w wh wr y
z
""".split()
_VOWELS = 'a a e e i i o o u ai au ea ee ei ie io oa oo ou ui y'.split()
_CODAS = (
    """
ck ct d dd f ff ft g gg gh k l ld ll lm lt m mp n nd ng nk nt p pt r rb rd rk rm rn rt s sh ss st t th tt v w x z zz
""".split()
    + [''] * 6
)


def _is_kept_for_val(piece: str) -> bool:
    return zlib.crc32(piece.encode()) % 5 == 0


def _vocabulary() -> Dict[str, Dict[str, List[str]]]:
    """Words of either split, by kind."""
    vocabulary: Dict[str, Dict[str, List[str]]] = {split: {} for split in SPLITS}
    for kind, words in (('n', _NOUNS), ('N', _NAMES), ('v', _VERBS), ('a', _ADJECTIVES)):
        for split in SPLITS:
            vocabulary[split][kind] = [w for w in sorted(set(words)) if _is_kept_for_val(w) == (split == 'val')]
    return vocabulary


_VOCABULARY = _vocabulary()


def _of_split(split: str, draw: Callable[[], str]) -> str:
    """The first draw that belongs to the split."""
    while True:
        piece = draw()
        if _is_kept_for_val(piece) == (split == 'val'):
            return piece


def _sentence(split: str, rng: random.Random) -> str:
    text = rng.choice(_SENTENCES)
    for kind, words in _VOCABULARY[split].items():
        while f'{{{kind}}}' in text:
            text = text.replace(f'{{{kind}}}', rng.choice(words), 1)
    while '{d}' in text:
        text = text.replace('{d}', _integer(split, rng), 1)
    if rng.random() < 0.15:
        mark = rng.choice(_MARKS)
        pair = {'(': '()', ')': '()', '"': '""', '*': '**', '\u201c': '\u201c\u201d'}
        left, right = pair.get(mark, (f'{mark} ', ''))
        words = text.split(' ')
        at = rng.randrange(len(words))
        words[at] = f'{left}{words[at]}{right}'
        text = ' '.join(words)
    return text.replace("'", '\u2019') if rng.random() < 0.4 else text


def _made_up_word(split: str, rng: random.Random) -> str:
    def draw() -> str:
        syllables = range(rng.choice((1, 1, 2, 2, 3)))
        return ''.join(rng.choice(part) for _ in syllables for part in (_ONSETS, _VOWELS, _CODAS))

    return _of_split(split, draw)


def _made_up_words(split: str, rng: random.Random) -> str:
    words = [_made_up_word(split, rng) for _ in range(rng.randrange(3, 12))]
    return ' '.join([words[0].capitalize(), *words[1:]]) + rng.choice('....,;:?!-')


def _integer(split: str, rng: random.Random) -> str:
    return _of_split(split, lambda: str(rng.randrange(1, 10 ** rng.randrange(1, 8))))


def _number(split: str, rng: random.Random) -> str:
    """A number as prices, tables, dates and clocks have it."""
    style = rng.randrange(8)
    integer = _integer(split, rng)
    if style < 3:
        return integer
    if style < 5:
        return f'{int(integer):,}' + rng.choice(('', f'.{rng.randrange(100):02d}'))
    if style == 5:
        return f'{rng.randrange(100)}.{integer}'
    if style == 6:
        return f'{rng.randrange(24)}:{rng.randrange(60):02d}'
    return (
        f'{rng.randrange(1, 32)}{rng.choice("./-")}{rng.randrange(1, 13)}{rng.choice("./-")}{rng.randrange(1900, 2100)}'
    )


def _percentage(split: str, rng: random.Random) -> str:
    return f'{int(_integer(split, rng)) % 101}{rng.choice(("", "", f".{rng.randrange(100)}"))}%'


def _name(split: str, rng: random.Random) -> str:
    return ' '.join(rng.choice(_VOCABULARY[split]['N']) for _ in range(rng.choice((1, 2, 2))))


def _single_word(split: str, rng: random.Random) -> str:
    word = rng.choice(_VOCABULARY[split][rng.choice('nva')]) if rng.random() < 0.5 else _made_up_word(split, rng)
    return rng.choice((str.lower, str.lower, str.capitalize, str.upper))(word)


# kind of text, its share of images, what it is strung together of, and what stands between
_KINDS = {
    'prose': (35, _sentence, ' '),
    'made-up words': (10, _made_up_words, ' '),
    'capitals': (8, lambda split, rng: rng.choice((_sentence, _made_up_words))(split, rng).upper(), ' '),
    'names': (6, _name, ', '),
    'words': (8, _single_word, ' '),
    'numbers': (14, _number, ' '),
    'dollars': (8, lambda split, rng: f'${_number(split, rng)}', ' '),
    'percentages': (11, _percentage, ' '),
}
KINDS = tuple(_KINDS)
NUMBERS = ('numbers', 'dollars', 'percentages')


def random_kind(rng: random.Random) -> str:
    """A kind of text; numbers of one sort or another are 33 of 100."""
    return rng.choices(KINDS, [share for share, _, _ in _KINDS.values()])[0]


def random_text(split: str, kind: str, length: int, rng: random.Random) -> str:
    """A text of the split.

    Args:
        split: 'train' or 'val'.
        kind: One of `KINDS`.
        length: Characters at least, of which running prose is cut to exactly as many, inside words too.
        rng: Source of everything else.

    Returns:
        Text of letters, numbers, punctuation and single spaces.

    Raises:
        ValueError: If there is no such split or kind.
    """
    if split not in SPLITS or kind not in _KINDS:
        raise ValueError(f'No texts of split {split!r} and kind {kind!r}.')
    _, draw, between = _KINDS[kind]
    pieces = [draw(split, rng)]
    if kind in ('prose', 'made-up words', 'capitals'):
        offset = rng.randrange(len(pieces[0]))
        while sum(map(len, pieces)) + len(pieces) < offset + length + 2:
            pieces.append(draw(split, rng))
        return between.join(pieces)[offset : offset + length].strip() or pieces[0]
    while sum(map(len, pieces)) + len(between) * len(pieces) <= length:
        pieces.append(draw(split, rng))
    return between.join(pieces)
