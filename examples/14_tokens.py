"""Byte pair encoding, by hand: how a text becomes numbers, and numbers a text.

You will understand

- why a token is neither a character nor a word, but something between,
- how tokens are learnt: count pairs, merge the most frequent one, again,
- why a new text is encoded by the ranks of merges, not by the longest tokens,
- why every text has tokens, and why a token may be a part of a character.

Counterpart: npgpt/data/bpe.py, where the package tokenizers does the same, and much faster.
Next: 15_bfloat16.py, where numbers get shorter; or `python -m npgpt.train --tokenizer bpe`, on a text of your own.
Try it: let " widest" come 8 times in `small`, work out the nine tokens by hand, and write them where they stand now.

    python examples/14_tokens.py
"""

import importlib.util
import json
import re
import unicodedata
from collections import Counter
from itertools import pairwise

from checks import check, finish

# Ten texts of different kinds, for the experiments below.

TEXTS = {
    "English": "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity; it wasn't dark, we'd say it's light.",
    "the same letters": "aaaaaaaa aaaaaaa aaaa aaa aa a aaaabaaaab abababab bababa mississippi ississ",
    "accents": "Über allen Gipfeln ist Ruh, über allen Wäldern; où êtes-vous, très chère? Là où l'été s'était arrêté.",
    "Chinese": "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。故常无欲，以观其妙；常有欲，以观其徼。",
    "Arabic": "السلام عليكم، وعليكم السلام ورحمة الله. العِلْمُ نورٌ والجهلُ ظلام، والعلم في الصدور لا في السطور.",
    "emoji": "😀😀😃 😀😃😄! 👩‍👩‍👧 👩‍👩‍👦 👍🏽👍🏽👍 🏳️‍🌈 🏳️‍🌈 ❤️❤️",
    "code": "def f(x):\n    if x > 0:\n        return f(x - 1)\n    return x\n\nfor x in range(9):\n    print(f(x))\n",
    "digits": "3.14159 31415 1000000 1,000,000 1969 1970 1971 0x1F 10e-10 ½ ¼ ½ x² y² Ⅷ Ⅷ ٣٤ ٣٤ 2024-12-24",
    "white space": "a  b   c    d\n\n\ne\n\n\n\tf\t\tg \n \n h\r\n\r\ni\u00a0\u00a0j\u3000\u3000k  \n    l    ",
    "hardly anything": " ",
}

# --------------------------------------------------------------------------------------------------------------------
# What is a token?  It is what a model has a row for in its embedding (08_embedding.py), so there must not be too many
# different ones.  If each character is one, Chinese alone needs thousands.  If each word is one, there are even more,
# and the next text has a word that is not among them.  A byte is one of 256, and every text has bytes: UTF-8 writes an
# English letter as one byte, and other characters as two to four.  But as bytes, a text is long.  So begin with the
# bytes, and add tokens for what comes often: pairs of bytes, pairs of those, up to whole words.

for character in "eü道😀":
    print(f"{character!a:>12} is {list(character.encode())}")  # !a shows it in ASCII, for every terminal

# Each token has a number, which will also decide between pairs.  GPT-2 numbers the bytes in an order of its own.  First
# come those that stand for a visible character in Latin-1, an old code of one byte for each character; so letters stand
# in the order of the alphabet.  Then come the others.  A blank is one of them: its number is 220.

ORDER = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ORDER += [byte for byte in range(256) if byte not in ORDER]
BYTES = {bytes([byte]): number for number, byte in enumerate(ORDER)}  # here a token is a bytes object

# --------------------------------------------------------------------------------------------------------------------
# Cuts.  If tokens could be anything, "dog.", "dog!" and "dog?" would become three of them.  So a text is first cut into
# words, and no token goes beyond its word.  These are GPT-2's words.  At each place, the first line that fits is taken:
#
#     's 't 're 've 'm 'll 'd      what English makes of "is", "not", "are", "have", "am", "will", "had"
#     letters, digits, or signs    as many of one kind as follow each other; one blank before them is a part of the word
#     white space                  as much as there is.  But if a word follows, all but the last: that may be its blank
#     white space                  what is still left
#
# In the pattern, | stands between the lines, and a ? after a blank makes it optional.  (?!\S) holds before white space
# and at the end.  Where a word follows it does not hold, until \s+ has given its last one back.  The pattern knows
# ASCII only.  So it gets a copy of the text in which each other character is replaced by one of its kind.

WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def ascii_of_its_kind(character):
    if ord(character) < 128:
        return character
    if character.isspace():
        return "\t"
    kind = unicodedata.category(character)[0]  # Unicode's: L for letters, N for numbers, and others
    return {"L": "A", "N": "0"}.get(kind, "!")


def cut(text):
    """A text -> its words, which together are the text again."""
    copy = "".join(ascii_of_its_kind(character) for character in text)
    return [text[word.start() : word.end()] for word in WORD.finditer(copy)]


def wrong(found, expected):
    """In how many places two lists differ."""
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


sentence = "It's 10 times   too\u00a0long, isn't it?\n\n  No!"
by_hand = "It|'s| 10| times|  | too|\u00a0|long|,| isn|'t| it|?|\n\n | No|!"
print(f"\n{sentence!a} is cut like this:")
print(ascii("|".join(cut(sentence))))
check("the cuts, and those made by hand", wrong(cut(sentence), by_hand.split("|")), 0)
check("texts that their words are not again", sum("".join(cut(text)) != text for text in TEXTS.values()), 0)

# --------------------------------------------------------------------------------------------------------------------
# Learning.  Count the pairs of neighbours in all words.  Merge the most frequent pair into a new token, wherever it
# stands.  Count again.  As a text repeats its words, each is kept once, with the number of times that it comes.  (To
# be fast, the package tokenizers keeps the counts, and changes those that a merge has changed.)


def merge(parts, pair):
    """Put the neighbours of a pair together wherever they stand, from left to right: a a a with (a, a) is aa a."""
    merged, i = [], 0
    while i < len(parts):
        here = tuple(parts[i : i + 2]) == pair
        merged.append(parts[i] + parts[i + 1] if here else parts[i])
        i += 2 if here else 1
    return merged


def single_bytes(word):
    return [bytes([byte]) for byte in word.encode()]


def learn(text, size):
    """A text -> numbers: token -> its number, for at most `size` tokens; and merges: the pairs, in their order."""
    words = Counter(cut(text))  # word -> how many times it comes
    parts = {word: single_bytes(word) for word in words}
    numbers, merges = dict(BYTES), []
    while len(numbers) < size:
        counts = Counter()
        for word, times in words.items():
            for pair in pairwise(parts[word]):
                counts[pair] += times
        # the largest count; of several, the smallest number of the first token; then that of the second
        best = min(counts, key=lambda pair: (-counts[pair], numbers[pair[0]], numbers[pair[1]]), default=None)
        if best is None or counts[best] < 2:  # what comes only once gets no token
            break
        merges.append(best)
        numbers.setdefault(best[0] + best[1], len(numbers))  # (aa + a and a + aa, say, are one token)
        parts = {word: merge(parts[word], best) for word in words}
    return numbers, merges


# By hand.  Take four words: " low" 5 times, " lower" 2, " newest" 6, " widest" 3.  Here _ is the blank.
#
#     the most frequent pairs                           merged      why this one
#     e s 9,   s t 9,   w e 8,   _ l 7,   l o 7 ...     es          9 is the most, and e has a smaller number than s
#     es t 9,   _ l 7,   l o 7,   o w 7 ...             est         9 is the most (w e is left in " lower": 2)
#     _ l 7,   l o 7,   o w 7,   _ n 6 ...              lo          l comes before o in the alphabet, and _ is 220
#     _ lo 7,   lo w 7,   _ n 6 ...                     _lo         _ is 220, and lo is 258
#     _lo w 7,   _ n 6,   n e 6 ...                     _low        7 is the most
#     _ n 6,   n e 6,   e w 6,   w est 6 ...            ew          e comes before n and w
#     _ n 6,   n ew 6,   ew est 6 ...                   new         n comes before _, which is 220, and ew, which is 261
#     _ new 6,   new est 6 ...                          _new        _ is 220, and new is 262
#     _new est 6,   d est 3 ...                         _newest     6 is the most

small = " low" * 5 + " lower" * 2 + " newest" * 6 + " widest" * 3
numbers, merges = learn(small, 256 + 9)
by_hand = [b"es", b"est", b"lo", b" lo", b" low", b"ew", b"new", b" new", b" newest"]
print("\nlearnt:", *(f"{number} {token.decode()!r}" for token, number in numbers.items() if number > 255))
check("the tokens learnt, and those learnt by hand", wrong(list(numbers)[256:], by_hand), 0)
check("a letter three times, its pair merged", wrong(merge([b"a", b"a", b"a"], (b"a", b"a")), [b"aa", b"a"]), 0)
check("tokens for what comes only once", len(learn("what comes once", 300)[1]), 0)

# --------------------------------------------------------------------------------------------------------------------
# Encoding.  Each word of a new text begins as bytes again.  The rank of a pair is its place in the list of merges.  Of
# the pairs in the word, the one with the lowest rank, learnt first, is merged.  Again, until no pair in it has a rank.


def encode_word(word, ranks):
    """A word -> its tokens, as bytes objects.  ranks: pair -> rank."""
    parts = single_bytes(word)
    while True:
        known = [pair for pair in pairwise(parts) if pair in ranks]
        if not known:
            return parts
        parts = merge(parts, min(known, key=ranks.get))


def encode(text, numbers, merges):
    """A text -> the numbers of its tokens."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return [numbers[token] for word in cut(text) for token in encode_word(word, ranks)]


lowest = encode(" lowest", numbers, merges)
print("\n' lowest', which is not among the four words:", lowest)
check("' lowest', encoded, and by hand: _low est", wrong(lowest, [numbers.get(b" low"), numbers.get(b"est")]), 0)

# Why ranks?  One could also take the longest token that the word begins with, then the longest that the rest begins
# with, and so on.  Put together, these are the same word.  But some words would get other tokens than they had at the
# end of learning, and the counts that chose the tokens would not fit.  By rank, a word is merged as it was then.


def longest_first(word, numbers):
    rest, parts = word.encode(), []
    while rest:
        length = max(n for n in range(1, len(rest) + 1) if rest[:n] in numbers)
        parts.append(rest[:length])
        rest = rest[length:]
    return parts


def replay(word, merges):
    """What learning did: all merges in their order, whether the word has the pair or not."""
    parts = single_bytes(word)
    for pair in merges:
        parts = merge(parts, pair)
    return parts


everything = "\n".join(TEXTS.values())
numbers, merges = learn(everything, 600)  # fewer: what is left comes only once
ranks = {pair: rank for rank, pair in enumerate(merges)}
words = sorted(set(cut(everything + everything.lower())))  # the small letters make words that learning did not see
by_rank = [encode_word(word, ranks) for word in words]
differ = sum(longest_first(word, numbers) != parts for word, parts in zip(words, by_rank, strict=True))
print(f"\n{len(numbers)} tokens learnt from ten texts: with the longest first, {differ} of {len(words)} words differ,")
print("' bababa' by rank", encode_word(" bababa", ranks), "  with the longest first", longest_first(" bababa", numbers))
check("words, by rank and replayed", wrong(by_rank, [replay(word, merges) for word in words]), 0)

# --------------------------------------------------------------------------------------------------------------------
# Decoding.  Put the bytes of all tokens together, then read them as UTF-8.


def decode(tokens, numbers):
    """The numbers of tokens -> the text.  A part of a character alone is written as U+FFFD."""
    bytes_of = {number: token for token, number in numbers.items()}
    return b"".join(bytes_of[token] for token in tokens).decode("utf-8", "replace")


# Every text has tokens, as every byte is one.  But a text of a kind that learning did not see stays bytes.  Then a
# model has more tokens to read and write, and sees less of the text at once.  (English alone does not give the 310
# tokens that it may: what is left comes only once.)

ten, english = learn(everything, 310), learn(TEXTS["English"], 310)
print(f"\ntokens, learnt from ten texts: {len(ten[0])}, and from the English one: {len(english[0])}")
print("                   characters   bytes   tokens, learnt from ten   learnt from English")
failed = 0
for name, text in TEXTS.items():
    of_ten, of_english = encode(text, *ten), encode(text, *english)  # each is a pair: numbers and merges
    failed += (decode(of_ten, ten[0]) != text) + (decode(of_english, english[0]) != text)
    print(f"{name:<18} {len(text):10} {len(text.encode()):7} {len(of_ten):28} {len(of_english):21}")
check("texts that are not given back", failed, 0)

# A token may be a part of a character.  So a program that shows a text token by token has to wait for the other parts.

tokens = encode("😀", *english)
alone = [decode([token], english[0]) for token in tokens]
print(f"\n{'😀'!a} is {tokens} in the tokens of English.  Decoded one by one: {alone!a}")

# --------------------------------------------------------------------------------------------------------------------
# The proof: npgpt's tokenizer, which the package tokenizers learns.  In its JSON, a letter stands for each byte.
# `vocab` has the number of each token, `merges` has the pairs.

if importlib.util.find_spec("tokenizers"):
    from npgpt.data.bpe import BPETokenizer

    theirs = BPETokenizer.learn([everything], 600)
    model = json.loads(theirs.json)["model"]
    # old versions of the package write a pair as one string, with a blank between
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    their_merges = [(model["vocab"][a], model["vocab"][b]) for a, b in pairs]
    their_tokens = [theirs.bytes_of(number) for number in range(theirs.vocab_size)]
    check("merges, and npgpt's", wrong([(numbers[a], numbers[b]) for a, b in merges], their_merges), 0)
    check("tokens, and npgpt's", wrong(list(numbers), their_tokens), 0)
    differ = sum(wrong(encode(text, numbers, merges), theirs.encode(text)) for text in TEXTS.values())
    check("the ten texts, encoded, and by npgpt", differ, 0)
else:
    print("\nnot compared with npgpt's tokenizer: that needs the package tokenizers, pip install 'npgpt[hub]'")

finish()
