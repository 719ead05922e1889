"""The instructions of a model's layers but its mixers, as functions on flat arrays.

w are the weights and b those in int8, x is the scratch memory of a row, s and n are the numbers and whole numbers of
its state. The functions compute what the modules in :mod:`resnet_bk.layers` do, for one position.
"""

import math

import numpy as np
from numba import njit, prange

from resnet_bk.engine.instructions import Op
from resnet_bk.jit import OPTIONS, TASKS
from resnet_bk.jit.hashing import longer, place
from resnet_bk.jit.simd import LANE_BYTES, load, load_bytes, sigmoid, splat, spread, store
from resnet_bk.ngram_format import LEVEL_AT, LEVELS, SHARES, TAG_AT, TAG_BITS

TILE_LANES = 2  # registers of outputs that a pass over the inputs computes; matrices are stored in tiles of that width
EPS = 1e-5  # of norms
SHARED = 2**18  # numbers of a matrix that several threads multiply with sooner than one

helper, on_threads = njit(**OPTIONS), njit(parallel=True, nogil=True, **OPTIONS)


@helper
def sigmoid_of(v):
    return 1 / (1 + math.exp(-v))


@helper
def softplus_of(v):
    return v if v > 20 else math.log1p(math.exp(v))


@helper
def whole_registers(x, width):
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
    part_of_linear(w, x, out, source, inner, 0, outer, at, bias)


@helper
def add_products(x, at, left, right, a, b):
    v = spread(x, at)
    return a + v * left, b + v * right


@helper
def keep_sums(w, x, out, bias, first, a, b):
    """Write two registers of outputs from `first` on, with their biases if there are any."""
    lanes = LANE_BYTES // w.itemsize
    if bias >= 0:
        a += load(w, bias + first)
        b += load(w, bias + first + lanes)
    store(x, out + first, a)
    store(x, out + first + lanes, b)


@helper
def part_of_linear(w, x, out, source, inner, begin, end, at, bias):
    """Compute the outputs from `begin`, which begins a tile, to `end`."""
    lanes = LANE_BYTES // w.itemsize
    zero = splat(w.dtype.type(0))
    for first in range(begin, end, 2 * lanes):
        a, b, c, d = zero, zero, zero, zero
        row = at + first * inner
        for i in range(source, source + inner - 1, 2):
            a, b = add_products(x, i, load(w, row), load(w, row + lanes), a, b)
            c, d = add_products(x, i + 1, load(w, row + 2 * lanes), load(w, row + 3 * lanes), c, d)
            row += 4 * lanes
        if inner % 2:
            a, b = add_products(x, source + inner - 1, load(w, row), load(w, row + lanes), a, b)
        a += c
        b += d
        if bias >= 0:  # not by `keep_sums`, which makes a step of a small model 6% slower
            a += load(w, bias + first)
            b += load(w, bias + first + lanes)
        store(x, out + first, a)
        store(x, out + first + lanes, b)


@helper
def linear_of_bytes(w, b, x, out, source, inner, outer, at, scales, bias):
    """Compute a matrix product with int8 numbers, each output times its scale."""
    part_of_linear_of_bytes(w, b, x, out, source, inner, 0, outer, at, scales, bias)


@helper
def part_of_linear_of_bytes(w, b, x, out, source, inner, begin, end, at, scales, bias):
    lanes, one = LANE_BYTES // w.itemsize, w.dtype.type(1)
    zero = splat(w.dtype.type(0))
    for first in range(begin, end, 2 * lanes):
        p, q = zero, zero
        row = at + first * inner
        for i in range(source, source + inner):
            p, q = add_products(x, i, load_bytes(b, row, one), load_bytes(b, row + lanes, one), p, q)
            row += 2 * lanes
        p *= load(w, scales + first)
        q *= load(w, scales + first + lanes)
        keep_sums(w, x, out, bias, first, p, q)


@helper
def linear_of_rows(w, b, x, rows, c):
    """Run an instruction LINEAR or LINEAR_OF_BYTES for some rows of x: four at a time, which read the matrix once.

    The results are those of each row alone, to the last bit.
    """
    fours = len(rows) - len(rows) % 4
    for i in range(0, fours, 4):
        if c[0] == Op.LINEAR:
            linear_of_four(w, x, rows[i : i + 4], c[1], c[2], c[3], c[4], c[5], c[6])
        else:
            linear_of_bytes_of_four(w, b, x, rows[i : i + 4], c[1], c[2], c[3], c[4], c[5], c[7], c[6])
    for row in rows[fours:]:
        if c[0] == Op.LINEAR:
            linear(w, x[row], c[1], c[2], c[3], c[4], c[5], c[6])
        else:
            linear_of_bytes(w, b, x[row], c[1], c[2], c[3], c[4], c[5], c[7], c[6])


@helper
def linear_of_four(w, x, rows, out, source, inner, outer, at, bias):
    lanes, width = LANE_BYTES // w.itemsize, x.shape[1]
    zero = splat(w.dtype.type(0))
    p, q, r, t = rows[0] * width, rows[1] * width, rows[2] * width, rows[3] * width
    for first in range(0, outer, 2 * lanes):
        pa, pb, pc, pd, qa, qb, qc, qd = zero, zero, zero, zero, zero, zero, zero, zero
        ra, rb, rc, rd, ta, tb, tc, td = zero, zero, zero, zero, zero, zero, zero, zero
        row = at + first * inner
        for i in range(source, source + inner - 1, 2):
            left, right = load(w, row), load(w, row + lanes)
            pa, pb = add_products(x, p + i, left, right, pa, pb)
            qa, qb = add_products(x, q + i, left, right, qa, qb)
            ra, rb = add_products(x, r + i, left, right, ra, rb)
            ta, tb = add_products(x, t + i, left, right, ta, tb)
            left, right = load(w, row + 2 * lanes), load(w, row + 3 * lanes)
            pc, pd = add_products(x, p + i + 1, left, right, pc, pd)
            qc, qd = add_products(x, q + i + 1, left, right, qc, qd)
            rc, rd = add_products(x, r + i + 1, left, right, rc, rd)
            tc, td = add_products(x, t + i + 1, left, right, tc, td)
            row += 4 * lanes
        if inner % 2:
            i, left, right = source + inner - 1, load(w, row), load(w, row + lanes)
            pa, pb = add_products(x, p + i, left, right, pa, pb)
            qa, qb = add_products(x, q + i, left, right, qa, qb)
            ra, rb = add_products(x, r + i, left, right, ra, rb)
            ta, tb = add_products(x, t + i, left, right, ta, tb)
        keep_sums(w, x, p + out, bias, first, pa + pc, pb + pd)
        keep_sums(w, x, q + out, bias, first, qa + qc, qb + qd)
        keep_sums(w, x, r + out, bias, first, ra + rc, rb + rd)
        keep_sums(w, x, t + out, bias, first, ta + tc, tb + td)


@helper
def linear_of_bytes_of_four(w, b, x, rows, out, source, inner, outer, at, scales, bias):
    lanes, width, one = LANE_BYTES // w.itemsize, x.shape[1], w.dtype.type(1)
    zero = splat(w.dtype.type(0))
    p, q, r, t = rows[0] * width, rows[1] * width, rows[2] * width, rows[3] * width
    for first in range(0, outer, 2 * lanes):
        pa, pb, qa, qb, ra, rb, ta, tb = zero, zero, zero, zero, zero, zero, zero, zero
        row = at + first * inner
        for i in range(source, source + inner):
            left, right = load_bytes(b, row, one), load_bytes(b, row + lanes, one)
            pa, pb = add_products(x, p + i, left, right, pa, pb)
            qa, qb = add_products(x, q + i, left, right, qa, qb)
            ra, rb = add_products(x, r + i, left, right, ra, rb)
            ta, tb = add_products(x, t + i, left, right, ta, tb)
            row += 2 * lanes
        left, right = load(w, scales + first), load(w, scales + first + lanes)
        keep_sums(w, x, p + out, bias, first, pa * left, pb * right)
        keep_sums(w, x, q + out, bias, first, qa * left, qb * right)
        keep_sums(w, x, r + out, bias, first, ra * left, rb * right)
        keep_sums(w, x, t + out, bias, first, ta * left, tb * right)


@on_threads
def shared_linear(w, b, x, out, source, inner, outer, at, scales, bias):
    """Compute a matrix product, with int8 numbers if there are scales, on the threads there are."""
    tile = TILE_LANES * (LANE_BYTES // w.itemsize)
    tiles = (outer + tile - 1) // tile
    for task in prange(TASKS):
        begin, end = tiles * task // TASKS * tile, min(outer, tiles * (task + 1) // TASKS * tile)
        if scales < 0:
            part_of_linear(w, x, out, source, inner, begin, end, at, bias)
        else:
            part_of_linear_of_bytes(w, b, x, out, source, inner, begin, end, at, scales, bias)


@helper
def norm(w, x, out, source, width, at):
    mean, square = w.dtype.type(0), w.dtype.type(0)
    for i in range(width):
        mean += x[source + i]
    mean /= width
    for i in range(width):
        square += (x[source + i] - mean) ** 2
    scale = w.dtype.type(1 / math.sqrt(square / width + EPS))
    for i in range(width):
        x[out + i] = (x[source + i] - mean) * scale * w[at + i]


@helper
def add_found(w, x, out, level, scale, gain, follows, shares, count, width):
    """Add a level's vector, and the vectors of `count` tokens with their shares, gain and scale; all but x are in w."""
    whole, lanes, _ = whole_registers(w, width)
    for i in range(0, whole, lanes):
        sums = load(x, out + i) + load(w, level + i)
        if count:
            own = splat(shares[0]) * load(w, follows[0] + i)
            for j in range(1, count):
                own += splat(shares[j]) * load(w, follows[j] + i)
            sums += splat(w[gain]) * load(w, scale + i) * own
        store(x, out + i, sums)
    for i in range(whole, width):
        own = w.dtype.type(0)
        for j in range(count):
            own += shares[j] * w[follows[j] + i]
        x[out + i] += w[level + i] + w[gain] * w[scale + i] * own


@helper
def ngrams(w, table, x, n, out, past, reach, orders, count, gain, levels, tokens, scale, width, token):
    """Add what the table has about the last tokens; then the token is one of them."""
    successors, rows = table.shape[1] - 1, len(table)
    slots, headers, tags = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    key, found = np.int64(0), 0
    for length in range(1, reach + 2):
        key = longer(key, token + 1 if length == 1 else n[past + reach + 1 - length])
        if w[orders + found] == length:
            slots[found], tags[found] = place(key, rows)
            found += 1
    for o in range(count):  # nothing depends on what is read, so that the processor fetches many entries at once
        headers[o] = table[slots[o], 0]
    follows, shares = np.empty(successors, np.int64), np.empty(successors, w.dtype)
    for o in range(count):
        here, following = o * LEVELS, 0
        if headers[o] >> 8 == tags[o]:
            here += headers[o] & 255
            for j in range(1, successors + 1):
                part = table[slots[o], j]
                if part & 255:
                    follows[following] = tokens + (part >> 8) * width
                    shares[following] = w.dtype.type(np.float32(part & 255) / np.float32(SHARES))
                    following += 1
        add_found(w, x, out, levels + here * width, scale + o * width, gain + here, follows, shares, following, width)
    for i in range(reach - 1):
        n[past + i] = n[past + i + 1]
    if reach:
        n[past + reach - 1] = token + 1


@helper
def recent_ngrams(
    w, x, n, out, past, reach, orders, count, gain, levels, tokens, scale, width, table, rows, vocabulary, token
):
    """Enter the token as what followed the contexts before it; then add what those that end with it have."""
    follows, shares = np.empty(1, np.int64), np.ones(1, w.dtype)
    for writes in (True, False):
        key, found = np.int64(0), 0
        for length in range(1, reach + 1):
            key = longer(key, n[past + reach - length])
            if w[orders + found] != length:
                continue
            slot, tag = place(key, rows)
            slot += table
            if writes:
                value = (tag << TAG_AT) | token
                times = n[slot] >> LEVEL_AT if n[slot] & ((1 << LEVEL_AT) - 1) == value else 0
                n[slot] = (min(times + 1, LEVELS - 1) << LEVEL_AT) | value
            else:
                here, level, following = found * LEVELS, n[slot] >> LEVEL_AT, 0
                follows[0] = n[slot] & ((1 << TAG_AT) - 1)
                # a state may come from elsewhere: nothing beyond the vectors is read
                if (
                    (n[slot] >> TAG_AT) & ((1 << TAG_BITS) - 1) == tag
                    and 0 < level < LEVELS
                    and follows[0] < vocabulary
                ):
                    here, following = here + level, 1
                    follows[0] = tokens + follows[0] * width
                vector = levels + here * width
                add_found(w, x, out, vector, scale + found * width, gain + here, follows, shares, following, width)
            found += 1
        if writes:
            for i in range(reach - 1):
                n[past + i] = n[past + i + 1]
            n[past + reach - 1] = token + 1


@helper
def silu(x, at, width):
    whole, lanes, one = whole_registers(x, width)
    for i in range(at, at + whole, lanes):
        v = load(x, i)
        store(x, i, v * sigmoid(v, one))
    for i in range(at + whole, at + width):
        x[i] *= sigmoid_of(x[i])


@helper
def swiglu(x, at, width):
    whole, lanes, one = whole_registers(x, width)
    for i in range(at, at + whole, lanes):
        v = load(x, i)
        store(x, i, v * sigmoid(v, one) * load(x, i + width))
    for i in range(whole, width):
        x[at + i] *= sigmoid_of(x[at + i]) * x[at + width + i]


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
