"""The instructions of adaptive techniques, as functions on flat arrays, see :mod:`resnet_bk.engine.layers`.

They decide for one position what the modules in :mod:`resnet_bk.adaptive` decide for all.
"""

import math

import numpy as np

from resnet_bk.config import BYTE_OFFSET, END_OF_DOCUMENT
from resnet_bk.engine.layers import helper, sigmoid_of, whole_registers
from resnet_bk.jit.simd import load, sigmoid, splat, store


@helper
def _in_word(token):
    byte = token - BYTE_OFFSET
    lower = byte | 32
    return (97 <= lower <= 122) or (48 <= byte <= 57) or byte == 95 or byte >= 128


@helper
def ends_word(token, last):
    return (_in_word(last) and not _in_word(token)) or token == 10 + BYTE_OFFSET or token == END_OF_DOCUMENT


@helper
def boundary(w, x, n, c, token):
    """Decide whether a chunk closes, and write how certain that is, or -1 where nothing is learned."""
    _, kind, score, since, last, factor, longest, trust, certain, _ = c[:10]
    count = n[since] + 1
    x[certain] = -1
    if kind == 0:
        closes = count % factor == 0
    else:
        word = ends_word(token, n[last])
        closes = word
        if kind >= 2:
            v = x[score] + (w[trust] * (2 * word - 1) if kind == 3 else w.dtype.type(0))
            closes = v > 0
            x[certain] = sigmoid_of(v) if closes else 1
        closes = closes or count % longest == 0
    n[since] = 0 if closes else count
    n[last] = token
    return closes


@helper
def add_to_pool(x, s, source, width, weight, at):
    v = sigmoid_of(min(max(x[weight], x.dtype.type(-30)), x.dtype.type(30))) if weight >= 0 else x.dtype.type(1)
    for i in range(width):
        s[at + i] += v * x[source + i]
    s[at + width] += v


@helper
def mean_of_pool(x, s, out, width, at, anew):
    total = s[at + width] if s[at + width] > 0 else x.dtype.type(1)
    for i in range(width):
        x[out + i] = s[at + i] / total
    if anew:
        for i in range(width + 1):
            s[at + i] = 0


@helper
def keep_result(x, s, y, width, at, certain):
    p = x[certain] if certain >= 0 and x[certain] >= 0 else x.dtype.type(1)
    for i in range(width):
        s[at + i] = x[y + i] if p == 1 else p * x[y + i] + (1 - p) * s[at + i]


@helper
def carried(w, x, at, width, since, gain, reach):
    """Scale a result by its distance."""
    row = gain + min(since, reach - 1) * width
    for i in range(width):
        x[at + i] *= 1 + w[row + i]


@helper
def add_gated(w, x, out, source, gate, width, scales):
    keep = w[scales] if scales >= 0 else w.dtype.type(1)
    take = w.dtype.type(2) * (w[scales + 1] if scales >= 0 else w.dtype.type(1))
    whole, lanes, one = whole_registers(x, width)
    for i in range(0, whole, lanes):
        added = splat(take) * load(x, source + i) * sigmoid(load(x, gate + i), one)
        store(x, out + i, splat(keep) * load(x, out + i) + added)
    for i in range(whole, width):
        x[out + i] = keep * x[out + i] + take * x[source + i] * sigmoid_of(x[gate + i])


@helper
def halts(x, at, out, left, score, width, threshold):
    halt, rest = sigmoid_of(x[score]), x[left]
    stops = rest - halt <= 1 - threshold
    weight = rest if stops else halt
    for i in range(width):
        x[out + i] += weight * x[at + i]
    x[left] = rest - weight
    return stops


@helper
def exits(x, kind, at, vocabulary, threshold):
    """Return whether a position is sure enough: by its predicted gain, or by its logits. With 1, none is."""
    if kind == 0:
        sure = math.exp(-x[at])
    else:
        top = x.dtype.type(-np.inf)
        for i in range(vocabulary):
            top = max(top, x[at + i])
        total = weighted = x.dtype.type(0)
        for i in range(vocabulary):
            p = math.exp(x[at + i] - top)
            total += p
            weighted += p * (x[at + i] - top)
        entropy = math.log(total) - weighted / total
        sure = 1 / total if kind == 1 else 1 - entropy / math.log(vocabulary)
    return threshold < 1 and min(sure, 1) >= threshold


@helper
def read_window(x, s, n, c):
    """Add a position to the prefix of its window; return whether the window is to choose its length now.

    n: offset in the window, and its length.
    """
    _, source, width, weight, place, at, prefix, needed, _ = c[:9]
    offset = n[place]
    if offset < prefix:
        add_to_pool(x, s, source, width, weight, at)
    return offset < needed and offset + 1 >= needed


@helper
def choose_length(w, x, n, scores, values, place, kind, groups, bins, shortest, longest):
    """Write the likeliest length. kind 1: the length itself is predicted."""
    if kind == 1:
        length = shortest + (longest - shortest) * sigmoid_of(x[scores])
        steps = np.int64(np.rint(length / shortest)) * shortest
        n[place + 1] = longest if length > longest - shortest / 2 else steps
        return
    best, largest = 0, x.dtype.type(-np.inf)
    if groups == 1:
        for i in range(bins):
            if x[scores + i] > largest:
                best, largest = i, x[scores + i]
    else:
        each = bins // groups
        for g in range(groups):
            first = scores + groups + g * each
            top = x.dtype.type(-np.inf)
            for i in range(each):
                top = max(top, x[first + i])
            total = x.dtype.type(0)
            for i in range(each):
                total += math.exp(x[first + i] - top)
            for i in range(each):
                v = x[scores + g] + x[first + i] - top - math.log(total)
                if v > largest:
                    best, largest = g * each + i, v
    n[place + 1] = np.int64(np.rint(w[values + best]))


@helper
def keeps(n, place, size, shortest, spread, by_words, token):
    """Return whether the window keeps a position.

    n: offset, length, positions since the last word, the last token. They move on to the next position.
    """
    offset, needed = n[place], shortest if shortest < size else 1
    length = n[place + 1] if offset + 1 >= needed else shortest
    word = by_words and ends_word(token, n[place + 3])
    if not spread:
        kept = offset < shortest or offset < length
    else:
        inside = offset < shortest
        length = shortest if inside else length
        span = shortest if inside else size - shortest
        at = offset if inside else offset - shortest
        cells = max(1, span * length // size)
        cell = at * cells // span
        start = -(-cell * span // cells)
        last = (at + 1) * cells // span > cell
        kept = n[place + 2] + 1 > at - start and (word or last)
    n[place + 2] = 0 if word else n[place + 2] + 1
    n[place + 3] = token
    return kept


@helper
def end_of_position(s, n, place, pool, width, size, shortest):
    n[place] += 1
    if n[place] == size:
        n[place] = 0
        n[place + 1] = shortest
        for i in range(width + 1):
            s[pool + i] = 0
