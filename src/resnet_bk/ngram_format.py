"""The entries of the tables of n-grams, and the constants of their hash. The engine reads them without torch.

An entry of n-gram memory belongs to a context, the last n tokens. It holds the tokens that followed most often:

    entries[slot] = [tag << 8 | level, next << 8 | share, next << 8 | share, ...]      int32

- tag: 16 further bits of the context's hash. Where the slot has another context, the tags agree by chance once in
  65,536 times.
- level: how often the context occurred, floor(1 + 2 log2(count)), at most LEVELS - 1; 0 in an empty entry.
- next: a token. share: 255 count(next) / (count + kinds), where `kinds` different tokens followed; the rest is for
  those that never did (method C of Witten and Bell 1991). It is rounded up: 0 is for a place without a token.

An entry of recent n-grams holds the token that followed last in the sequence so far:

    entries[slot] = level << 40 | tag << 24 | next                                     int64

- level: how many times in a row `next` has followed, at most LEVELS - 1; 0 in an empty entry.

Levels of the two kinds have nothing to do with each other.

A look-up finds for each position and order, 0 where the table has nothing:

    found = [level, next << 8 | share, next << 8 | share, ...]                         int32

Of recent n-grams it has one token, whose share is 255.
"""

STEP, MIX = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # odd 64-bit constants (Knuth's MMIX generator)
HASH_BITS, TAG_BITS = 32, 16  # bits of a hash that choose the slot, and bits of the tag
LEVELS, SHARES = 16, 255
TAG_AT, LEVEL_AT = 24, 24 + TAG_BITS  # where tag and level begin in an entry of recent n-grams
