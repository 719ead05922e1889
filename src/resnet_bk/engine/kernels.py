"""The interpreter of the engine's programs: one call is one token of each row.

Each instruction is a function on flat arrays, see :mod:`resnet_bk.engine.instructions`: w, the weights; x, the
scratch memory of a row; s and n, the numbers and whole numbers of its state. They are those of the layers in
:mod:`resnet_bk.layers` and :mod:`resnet_bk.adaptive`, for one position.
"""

import math

import numpy as np
from numba import njit, prange

from resnet_bk.config import BYTE_OFFSET, END_OF_DOCUMENT
from resnet_bk.engine.instructions import Op
from resnet_bk.layers.ngrams import LEVELS, MIX, SHARES, STEP
from resnet_bk.ops.numba_jit import OPTIONS, jit, jit_on_one_thread
from resnet_bk.ops.numba_simd import LANE_BYTES, load, load_bytes, sigmoid, splat, spread, store

TILE_LANES = 2  # registers of outputs that a pass over the inputs computes; matrices are stored in tiles of that width
TOKEN, BLOCKS = 0, 1  # the first whole numbers of a state: the token to read, and the blocks that it ran

helper = njit(**OPTIONS)


@helper
def _sigmoid(v):
    return 1 / (1 + math.exp(-v))


@helper
def _softplus(v):
    return v if v > 20 else math.log1p(math.exp(v))


@helper
def _whole(x, width):
    """Return how many of `width` numbers fill registers, how many each has, and lanes of 1."""
    lanes = LANE_BYTES // x.itemsize
    return width - width % lanes, lanes, splat(x.dtype.type(1))


@helper
def embed(w, b, x, out, at, width, scales, token):
    tile = TILE_LANES * (LANE_BYTES // w.itemsize)
    first = at + token // tile * tile * width + token % tile
    for i in range(width):
        x[out + i] = w[first + i * tile] if scales < 0 else w[scales + token] * b[first + i * tile]


@helper
def linear(w, x, out, source, inner, outer, at, bias):
    lanes = LANE_BYTES // w.itemsize
    zero = splat(w.dtype.type(0))
    for first in range(0, outer, 2 * lanes):
        a, b, c, d = zero, zero, zero, zero
        row = at + first * inner
        for i in range(0, inner - 1, 2):
            v = spread(x, source + i)
            a += v * load(w, row)
            b += v * load(w, row + lanes)
            v = spread(x, source + i + 1)
            c += v * load(w, row + 2 * lanes)
            d += v * load(w, row + 3 * lanes)
            row += 4 * lanes
        if inner % 2:
            v = spread(x, source + inner - 1)
            a += v * load(w, row)
            b += v * load(w, row + lanes)
        a += c
        b += d
        if bias >= 0:
            a += load(w, bias + first)
            b += load(w, bias + first + lanes)
        store(x, out + first, a)
        store(x, out + first + lanes, b)


@helper
def linear_of_bytes(w, b, x, out, source, inner, outer, at, scales, bias):
    """Compute a matrix product with int8 numbers, each output times its scale."""
    lanes, one = LANE_BYTES // w.itemsize, w.dtype.type(1)
    zero = splat(w.dtype.type(0))
    for first in range(0, outer, 2 * lanes):
        sums, more = zero, zero
        row = at + first * inner
        for i in range(source, source + inner):
            v = spread(x, i)
            sums += v * load_bytes(b, row, one)
            more += v * load_bytes(b, row + lanes, one)
            row += 2 * lanes
        sums *= load(w, scales + first)
        more *= load(w, scales + first + lanes)
        if bias >= 0:
            sums += load(w, bias + first)
            more += load(w, bias + first + lanes)
        store(x, out + first, sums)
        store(x, out + first + lanes, more)


@helper
def norm(w, x, out, source, width, at):
    mean, square = w.dtype.type(0), w.dtype.type(0)
    for i in range(width):
        mean += x[source + i]
    mean /= width
    for i in range(width):
        square += (x[source + i] - mean) ** 2
    scale = w.dtype.type(1 / math.sqrt(square / width + 1e-5))
    for i in range(width):
        x[out + i] = (x[source + i] - mean) * scale * w[at + i]


@helper
def gated_norm(w, x, y, gate, heads, width, at):
    for h in range(heads):
        norm(w, x, y + h * width, y + h * width, width, at)
    whole, lanes, one = _whole(x, heads * width)
    for i in range(0, whole, lanes):
        v = load(x, gate + i)
        store(x, y + i, load(x, y + i) * v * sigmoid(v, one))
    for i in range(whole, heads * width):
        x[y + i] *= x[gate + i] * _sigmoid(x[gate + i])


@helper
def ngrams(w, table, x, n, out, past, reach, orders, count, gain, levels, tokens, scale, width, token):
    """Add what the table has about the last tokens; then the token is one of them."""
    successors, rows = table.shape[1] - 1, len(table)
    key = np.int64(0)
    found = 0
    for length in range(1, reach + 2):
        new = token + 1 if length == 1 else n[past + reach + 1 - length]
        key = (key + new + 1) * np.int64(STEP)
        if w[orders + found] != length:
            continue
        mixed = (key ^ (key >> 29)) * np.int64(MIX)
        slot = (((mixed >> 32) & 0xFFFFFFFF) * rows) >> 32
        here = found * LEVELS
        if table[slot, 0] >> 8 == (mixed >> 12) & 0xFFFF:
            here += table[slot, 0] & 255
            for j in range(successors):
                share = w.dtype.type(np.float32(table[slot, 1 + j] & 255) / np.float32(SHARES))
                if share > 0:
                    follows = tokens + (table[slot, 1 + j] >> 8) * width
                    share *= w[gain + here]
                    for i in range(width):
                        x[out + i] += share * w[scale + found * width + i] * w[follows + i]
        for i in range(width):
            x[out + i] += w[levels + here * width + i]
        found += 1
        if found == count:
            break
    for i in range(reach - 1):
        n[past + i] = n[past + i + 1]
    if reach:
        n[past + reach - 1] = token + 1


@helper
def conv(w, x, s, u, channels, taps, at, past):
    whole, lanes, _ = _whole(x, channels)
    for c in range(0, whole, lanes):
        new = load(x, u + c)
        sums = load(w, at + (taps - 1) * channels + c) * new
        for i in range(taps - 1):
            before = load(s, past + i * channels + c)
            sums += load(w, at + i * channels + c) * before
            if i:
                store(s, past + (i - 1) * channels + c, before)
        store(x, u + c, sums)
        if taps > 1:
            store(s, past + (taps - 2) * channels + c, new)
    for c in range(whole, channels):
        new = x[u + c]
        sums = w[at + (taps - 1) * channels + c] * new
        for i in range(taps - 1):
            sums += w[at + i * channels + c] * s[past + i * channels + c]
        x[u + c] = sums
        for i in range(taps - 2):
            s[past + i * channels + c] = s[past + (i + 1) * channels + c]
        if taps > 1:
            s[past + (taps - 2) * channels + c] = new


@helper
def silu(x, at, width):
    whole, lanes, one = _whole(x, width)
    for i in range(at, at + whole, lanes):
        v = load(x, i)
        store(x, i, v * sigmoid(v, one))
    for i in range(at + whole, at + width):
        x[i] *= _sigmoid(x[i])


@helper
def queries_and_keys(x, q, k, heads, width, softened):
    for h in range(heads):
        square = x.dtype.type(0)
        for i in range(width):
            x[q + h * width + i] /= math.sqrt(x.dtype.type(width))
            square += x[k + h * width + i] ** 2
        if softened:
            for i in range(width):
                x[k + h * width + i] /= math.sqrt(1 + square)


@helper
def real_energies(w, x, s, v, heads, shift, past):
    """Replace the potentials by alpha and write beta behind them: both from the new g."""
    for h in range(heads):
        g = 1 / (-2 - _softplus(x[v + h]) - w[shift + h] - s[past + h])
        s[past + h] = g
        x[v + h], x[v + heads + h] = -g, g


@helper
def complex_energies(w, x, s, v, heads, shift, past):
    """Write decay, angle, weight and angle of the weight, (4, H), over the potentials."""
    for h in range(heads):
        re = -2 + x[v + h] - w[shift + h] - s[past + 2 * h]
        im = -w[shift + heads + h] - s[past + 2 * h + 1]
        size = re * re + im * im
        re, im = re / size, -im / size
        s[past + 2 * h], s[past + 2 * h + 1] = re, im
        x[v + heads + h], x[v + 3 * heads + h] = math.atan2(-im, -re), math.atan2(im, re)
        x[v + h] = x[v + 2 * heads + h] = math.sqrt(re * re + im * im)


@helper
def rotate(x, at, heads, width, angles):
    """Multiply pairs of channels, complex numbers, by e^(i angle) of their head."""
    for h in range(heads):
        c, d = math.cos(x[angles + h]), math.sin(x[angles + h])
        for i in range(at + h * width, at + (h + 1) * width, 2):
            x[i], x[i + 1] = x[i] * c - x[i + 1] * d, x[i] * d + x[i + 1] * c


@helper
def rotate_state(x, s, at, heads, width, values, angles):
    """Multiply pairs of rows of the state (H, K, V) by e^(i angle) of their head."""
    for h in range(heads):
        c, d = math.cos(x[angles + h]), math.sin(x[angles + h])
        for i in range(0, width, 2):
            row = at + (h * width + i) * values
            for j in range(row, row + values):
                s[j], s[j + values] = s[j] * c - s[j + values] * d, s[j] * d + s[j + values] * c


@helper
def scan(x, s, q, k, v, alpha, beta, y, heads, width, values, at, delta):
    """Write k and v, or what the state lacks of v, into the state (H, K, V + padding), and read it with q."""
    lanes = LANE_BYTES // x.itemsize
    stride = -(-values // lanes) * lanes
    zero = splat(x.dtype.type(0))
    for h in range(heads):
        a, b = splat(x[alpha + h]), splat(x[beta + h])
        for c in range(0, values, lanes):
            known, row = zero, at + h * width * stride + c
            new = load(x, v + h * values + c)
            if delta:
                for i in range(width):
                    known += spread(x, k + h * width + i) * load(s, row + i * stride)
                new = new - a * known
            new, read = b * new, zero
            for i in range(width):
                z = a * load(s, row + i * stride) + spread(x, k + h * width + i) * new
                store(s, row + i * stride, z)
                read += spread(x, q + h * width + i) * z
            store(x, y + h * values + c, read)


@helper
def left_out(w, x, s, v, alpha, beta, y, heads, width, values, at, last, fill):
    """Let the state decay at a site that is left out; it reads the last read, faded, and a part of its own value."""
    lanes = LANE_BYTES // x.itemsize
    size = width * (-(-values // lanes) * lanes)
    for h in range(heads):
        a = x[alpha + h]
        for i in range(at + h * size, at + (h + 1) * size):
            s[i] *= a
        for j in range(h * values, (h + 1) * values):
            s[last + j] *= w[fill + h] * a
            x[y + j] = s[last + j] + w[fill + heads + h] * x[beta + h] * x[v + j]


@helper
def green(w, x, s, v, heads, shift, past, imaginary, out, fill):
    """Write the left Green's functions as features. At a site that is left out (fill >= 0) the state stays."""
    for h in range(heads):
        link = w[fill + h] if fill >= 0 else w.dtype.type(1)
        if not imaginary:
            g = 1 / (-2 - _softplus(x[v + h]) - w[shift + h] - link * s[past + h])
            x[out + h] = g
            if fill < 0:
                s[past + h] = g
            continue
        re = -2 + x[v + h] - w[shift + h] - link * s[past + 2 * h]
        im = -w[shift + heads + h] - link * s[past + 2 * h + 1]
        size = re * re + im * im
        x[out + 2 * h], x[out + 2 * h + 1] = re / size, -im / size
        if fill < 0:
            s[past + 2 * h], s[past + 2 * h + 1] = re / size, -im / size


@helper
def attend(w, x, s, qkv, y, heads, width, window, at, turns, scores):
    """Attend to the W - 1 positions of the state and to this one, which then joins the state.

    turns: cosines and sines of the angles of each distance, (W, K / 2, 2).
    """
    d = heads * width
    row = 2 * d + 2
    for h in range(heads):
        q = qkv + h * width
        top = x.dtype.type(-np.inf)
        for j in range(window):
            if j < window - 1 and s[at + j * row + 2 * d] == 0:
                x[scores + j] = -np.inf
                continue
            turn = turns + (window - 1 - j) * width
            sums = x.dtype.type(0)
            for i in range(0, width, 2):
                if j < window - 1:
                    re, im = s[at + j * row + h * width + i], s[at + j * row + h * width + i + 1]
                else:
                    re, im = x[qkv + d + h * width + i], x[qkv + d + h * width + i + 1]
                c, e = w[turn + i], w[turn + i + 1]
                sums += (x[q + i] * c - x[q + i + 1] * e) * re + (x[q + i] * e + x[q + i + 1] * c) * im
            x[scores + j] = sums / math.sqrt(x.dtype.type(width))
            top = max(top, x[scores + j])
        total = x.dtype.type(0)
        for i in range(width):
            x[y + h * width + i] = 0
        for j in range(window):
            if x[scores + j] == -np.inf:
                continue
            p = math.exp(x[scores + j] - top)
            total += p
            for i in range(width):
                if j < window - 1:
                    x[y + h * width + i] += p * s[at + j * row + d + h * width + i]
                else:
                    x[y + h * width + i] += p * x[qkv + 2 * d + h * width + i]
        for i in range(width):
            x[y + h * width + i] /= total
    if window > 1:
        for i in range(at, at + (window - 2) * row):
            s[i] = s[i + row]
        last = at + (window - 2) * row
        for i in range(2 * d):
            s[last + i] = x[qkv + d + i]
        s[last + 2 * d] = s[last + 2 * d + 1] = 1


@helper
def swiglu(x, at, width):
    whole, lanes, one = _whole(x, width)
    for i in range(at, at + whole, lanes):
        v = load(x, i)
        store(x, i, v * sigmoid(v, one) * load(x, i + width))
    for i in range(whole, width):
        x[at + i] *= _sigmoid(x[at + i]) * x[at + width + i]


@helper
def experts(w, b, x, c):
    """Add the chosen experts' outputs, each times its probability."""
    (
        _,
        out,
        source,
        logits,
        width,
        hidden,
        computing,
        identity,
        every,
        most,
        least,
        top_p,
        bias,
        up,
        down,
        scratch,
        scales,
    ) = c
    tile = TILE_LANES * (LANE_BYTES // w.itemsize)
    size_up, size_down = -(-2 * hidden // tile) * tile * width, -(-width // tile) * tile * hidden
    likely = scratch + -(-2 * hidden // tile) * tile + -(-width // tile) * tile
    result = scratch + -(-2 * hidden // tile) * tile
    softmax(x, logits, every, logits + every, -1, w, computing)
    softmax(x, logits, every, likely, bias, w, computing)
    for i in range(every):  # probabilities, from behind the logits
        x[logits + i] = x[logits + every + i]
    for i in range(width):
        x[out + i] = 0
    before = w.dtype.type(0)
    for rank in range(most):
        best = 0
        for e in range(1, every):
            if x[likely + e] > x[likely + best]:
                best = e
        share = x[likely + best]
        x[likely + best] = -1
        if top_p >= 0 and rank >= least and not before < w[top_p]:
            break
        before += share
        if best < computing:
            if scales < 0:
                linear(w, x, scratch, source, width, 2 * hidden, up + best * size_up, -1)
                swiglu(x, scratch, hidden)
                linear(w, x, result, scratch, hidden, width, down + best * size_down, -1)
            else:
                rows, columns = size_up // width, size_down // hidden
                at = scales + best * rows
                linear_of_bytes(w, b, x, scratch, source, width, 2 * hidden, up + best * size_up, at, -1)
                swiglu(x, scratch, hidden)
                at = scales + computing * rows + best * columns
                linear_of_bytes(w, b, x, result, scratch, hidden, width, down + best * size_down, at, -1)
            for i in range(width):
                x[out + i] += x[logits + best] * x[result + i]
        elif best < computing + identity:
            for i in range(width):
                x[out + i] += x[logits + best] * x[source + i]


@helper
def softmax(x, at, count, out, bias, w, biased):
    top = x.dtype.type(-np.inf)
    for i in range(count):
        x[out + i] = x[at + i] + (w[bias + i] if bias >= 0 and i < biased else w.dtype.type(0))
        top = max(top, x[out + i])
    total = x.dtype.type(0)
    for i in range(count):
        x[out + i] = math.exp(x[out + i] - top)
        total += x[out + i]
    for i in range(count):
        x[out + i] /= total


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
            x[certain] = _sigmoid(v) if closes else 1
        closes = closes or count % longest == 0
    n[since] = 0 if closes else count
    n[last] = token
    return closes


@helper
def add_to_pool(x, s, source, width, weight, at):
    v = _sigmoid(min(max(x[weight], x.dtype.type(-30)), x.dtype.type(30))) if weight >= 0 else x.dtype.type(1)
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
    take = 2 * (w[scales + 1] if scales >= 0 else w.dtype.type(1))
    for i in range(width):
        x[out + i] = keep * x[out + i] + take * x[source + i] * _sigmoid(x[gate + i])


@helper
def halts(w, x, at, out, left, score, width, threshold):
    halt, rest = _sigmoid(x[score]), x[left]
    stops = rest - halt <= 1 - w[threshold]
    weight = rest if stops else halt
    for i in range(width):
        x[out + i] += weight * x[at + i]
    x[left] = rest - weight
    return stops


@helper
def exits(w, x, kind, at, vocabulary, threshold):
    """Return whether a position is sure enough: by its predicted gain, or by its logits."""
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
    return min(sure, 1) >= w[threshold]


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
        length = shortest + (longest - shortest) * _sigmoid(x[scores])
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


@helper
def step(code, w, b, table, s, n, x):
    """Run a program for the token of one row."""
    token = n[TOKEN]
    n[BLOCKS] = 0
    at = 0
    while at < len(code):
        c = code[at]
        op = c[0]
        at += 1
        if op == Op.LINEAR:
            linear(w, x, c[1], c[2], c[3], c[4], c[5], c[6])
        elif op == Op.LINEAR_OF_BYTES:
            linear_of_bytes(w, b, x, c[1], c[2], c[3], c[4], c[5], c[7], c[6])
        elif op == Op.NORM:
            norm(w, x, c[1], c[2], c[3], c[4])
        elif op == Op.SCAN:
            scan(x, s, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
        elif op == Op.CONV:
            conv(w, x, s, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.SILU:
            silu(x, c[1], c[2])
        elif op == Op.SIGMOID:
            for i in range(c[1], c[1] + c[2]):
                x[i] = _sigmoid(x[i])
        elif op == Op.QUERIES:
            queries_and_keys(x, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.BONDS:
            for h in range(c[2]):
                x[c[1] + h] = _sigmoid(-x[c[1] + h] - w[c[3] + h])
        elif op == Op.REAL:
            real_energies(w, x, s, c[1], c[2], c[3], c[4])
        elif op == Op.COMPLEX:
            complex_energies(w, x, s, c[1], c[2], c[3], c[4])
        elif op == Op.ROTATE:
            rotate(x, c[1], c[2], c[3], c[4])
        elif op == Op.ROTATE_STATE:
            rotate_state(x, s, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.LEFT_OUT:
            left_out(w, x, s, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10])
        elif op == Op.GREEN:
            green(w, x, s, c[1], c[2], c[3], c[4], c[5], c[6], c[7])
        elif op == Op.GATED_NORM:
            gated_norm(w, x, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.GATE:
            for i in range(c[4]):
                v = x[c[3] + i]
                x[c[1] + i] = (x[c[1] + i] + x[c[2] + i]) * v * _sigmoid(v)
        elif op == Op.ATTEND:
            attend(w, x, s, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8])
        elif op == Op.SWIGLU:
            swiglu(x, c[1], c[2])
        elif op == Op.EXPERTS:
            experts(w, b, x, c)
        elif op == Op.ADD:
            for i in range(c[3]):
                x[c[1] + i] += x[c[2] + i]
        elif op == Op.COPY:
            for i in range(c[3]):
                x[c[1] + i] = x[c[2] + i]
        elif op == Op.EMBED:
            embed(w, b, x, c[1], c[2], c[3], c[4], token)
        elif op == Op.NGRAMS:
            ngrams(w, table, x, n, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], token)
        elif op == Op.SCORE:
            v = w.dtype.type(0)
            for i in range(c[3]):
                v += x[c[2] + i] * w[c[4] + i]
            x[c[1]] = w[c[5]] * v + w[c[5] + 1]
        elif op == Op.COUNT:
            n[BLOCKS] += c[1]
        elif op == Op.JUMP:
            at = c[1]
        elif op == Op.UNLESS_POSITIVE:
            if not x[c[1]] > 0:
                at = c[2]
        elif op == Op.POOL:
            add_to_pool(x, s, c[1], c[2], c[3], c[4])
        elif op == Op.BOUNDARY:
            if not boundary(w, x, n, c, token):
                at = c[9]
        elif op == Op.MEAN:
            mean_of_pool(x, s, c[1], c[2], c[3], c[4])
        elif op == Op.RESULT:
            keep_result(x, s, c[1], c[2], c[3], c[4])
        elif op == Op.CARRIED:
            carried(w, x, c[1], c[2], n[c[3]], c[4], c[5])
        elif op == Op.ADD_GATED:
            add_gated(w, x, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.HALT_START:
            for i in range(c[3]):
                x[c[1] + i] = 0
            x[c[2]] = 1
        elif op == Op.HALT:
            if halts(w, x, c[1], c[2], c[3], c[4], c[5], c[6]):
                at = c[7]
        elif op == Op.HALT_END:
            for i in range(c[4]):
                x[c[1] + i] = x[c[2] + i] + x[c[3]] * x[c[1] + i]
        elif op == Op.SKIP:
            if _sigmoid(x[c[1]]) < w[c[2]]:
                at = c[3]
        elif op == Op.EXIT:
            if exits(w, x, c[1], c[2], c[3], c[4]):
                at = c[5]
        elif op == Op.WINDOW:
            if not read_window(x, s, n, c):
                at = c[9]
        elif op == Op.CHOOSE:
            choose_length(w, x, n, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8])
        elif op == Op.KEEP:
            if not keeps(n, c[1], c[2], c[3], c[4], c[5], token):
                at = c[6]
        elif op == Op.SET_SINCE:
            n[c[1]] = 0 if c[2] else n[c[1]] + 1
        elif op == Op.SUBTRACT:
            for i in range(c[3]):
                x[c[1] + i] -= x[c[2] + i]
        elif op == Op.LOAD:
            for i in range(c[2]):
                x[c[1] + i] = s[c[3] + i]
        elif op == Op.STORE:
            for i in range(c[2]):
                s[c[3] + i] = x[c[1] + i]
        elif op == Op.END_OF_POSITION:
            end_of_position(s, n, c[1], c[2], c[3], c[4], c[5])


@jit_on_one_thread
def run_one(code, w, b, table, s, n, x):
    """Run a program for the token of the only row."""
    step(code, w, b, table, s[0], n[0], x[0])


@jit
def run(code, w, b, table, s, n, x):
    """Run a program for the tokens of all rows, on the threads there are."""
    for row in prange(len(s)):
        step(code, w, b, table, s[row], n[row], x[row])
