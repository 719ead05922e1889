"""The interpreter of the engine's programs: a call runs the program once for each token that a row reads."""

import math
from functools import partial

import numpy as np
from numba import prange

from resnet_bk.engine.instructions import Op
from resnet_bk.engine.layers import (
    SHARED,
    embed,
    experts,
    helper,
    linear,
    linear_of_bytes,
    linear_of_rows,
    ngrams,
    norm,
    recent_ngrams,
    shared_linear,
    sigmoid_of,
    silu,
    swiglu,
    whole_registers,
)
from resnet_bk.engine.mixers import (
    attend,
    complex_energies,
    conv,
    gated_norm,
    green,
    left_out,
    queries_and_keys,
    real_energies,
    rotate,
    rotate_state,
    scan,
)
from resnet_bk.engine.techniques import (
    add_gated,
    add_to_pool,
    boundary,
    carried,
    choose_length,
    end_of_position,
    exits,
    halts,
    keep_result,
    keeps,
    mean_of_pool,
    read_window,
)
from resnet_bk.jit import jit, jit_on_one_thread
from resnet_bk.jit.simd import exp, load, store

TOKEN, BLOCKS = 0, 1  # the first whole numbers of a state: the token to read, and the blocks that it ran


@helper
def step(code, at, w, b, table, s, n, x, threads, waits):
    """Run a program from the row `at` on, for the token of one row of the batch. Return where it stops: at its end.

    Args:
        threads: None leaves them alone; numba compiles a function for each.
        waits: None, or it stops before each matrix, to read it together with other rows.
    """
    token = n[TOKEN]
    if at == 0:
        n[BLOCKS] = 0
    while at < len(code):
        c = code[at]
        op = c[0]
        if waits is not None and (op == Op.LINEAR or op == Op.LINEAR_OF_BYTES):
            return at
        at += 1
        if op == Op.LINEAR:
            if threads is not None and c[3] * c[4] >= SHARED:
                shared_linear(w, b, x, c[1], c[2], c[3], c[4], c[5], -1, c[6])
            else:
                linear(w, x, c[1], c[2], c[3], c[4], c[5], c[6])
        elif op == Op.LINEAR_OF_BYTES:
            if threads is not None and c[3] * c[4] >= SHARED:
                shared_linear(w, b, x, c[1], c[2], c[3], c[4], c[5], c[7], c[6])
            else:
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
                x[i] = sigmoid_of(x[i])
        elif op == Op.QUERIES:
            queries_and_keys(x, c[1], c[2], c[3], c[4], c[5])
        elif op == Op.BONDS:
            for h in range(c[2]):
                x[c[1] + h] = sigmoid_of(-x[c[1] + h] - w[c[3] + h])
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
                x[c[1] + i] = (x[c[1] + i] + x[c[2] + i]) * v * sigmoid_of(v)
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
        elif op == Op.RECENT:
            recent_ngrams(
                w, x, n, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11], c[12], c[13], token
            )
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
            if halts(x, c[1], c[2], c[3], c[4], c[5], s[c[6]]):
                at = c[7]
        elif op == Op.HALT_END:
            for i in range(c[4]):
                x[c[1] + i] = x[c[2] + i] + x[c[3]] * x[c[1] + i]
        elif op == Op.SKIP:
            if sigmoid_of(x[c[1]]) < s[c[2]]:
                at = c[3]
        elif op == Op.EXIT:
            if exits(x, c[1], c[2], c[3], s[c[4]]):
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
    return at


@helper
def step_together(code, w, b, table, s, n, x, places):
    """Run a program for the tokens of several rows, which read each matrix together.

    places: (rows,) int64, where each row is in the program; rows at its end have no token. As programs only jump
    forward, the rows that are behind go on first, and the others wait for them.
    """
    behind = np.empty(len(places), np.int64)
    for row in range(len(places)):
        places[row] = step(code, places[row], w, b, table, s[row], n[row], x[row], None, True)
    at = places.min()
    while at < len(code):
        count = 0
        for row in range(len(places)):
            behind[count] = row
            count += places[row] == at
        linear_of_rows(w, b, x, behind[:count], code[at])
        for row in behind[:count]:
            places[row] = step(code, at + 1, w, b, table, s[row], n[row], x[row], None, True)
        at = places.min()


@helper
def choose(logits, random, temperature, weights):
    """Return the token that a :class:`resnet_bk.inference.sampling.Sampler` takes, -1 if logits are not finite.

    random: in [0, 1). weights: (V,) float64, scratch memory.
    """
    token, wrong = 0, False
    for i in range(len(logits)):
        wrong |= logits[i] != logits[i]
        if logits[i] > logits[token]:
            token = i
    greatest = logits[token]
    if wrong or not math.isfinite(greatest):
        return -1
    if temperature == 0:
        return token
    for i in range(len(logits)):
        weights[i] = (logits[i] - greatest) / logits.dtype.type(temperature)
    whole, lanes, _ = whole_registers(weights, len(weights))
    for i in range(0, whole, lanes):
        store(weights, i, exp(load(weights, i)))
    for i in range(whole, len(weights)):
        weights[i] = math.exp(weights[i])
    total = 0.0
    for i in range(len(weights)):
        total += weights[i]
        weights[i] = total
    return min(np.searchsorted(weights, random * total, side="right"), len(weights) - 1)


@helper
def write(code, w, b, table, s, n, x, at, logits, tokens, given, random, temperature, end, counts, threads):
    """Read given tokens one by one, then choose tokens and read all of them but the last one.

    Args:
        code, w, b, table, s, n, x, threads: see :func:`step`.
        at: where the logits of a step are in x.
        logits: (V,), after the last token that was read; changed in place.
        tokens: given ones, and places for others.
        random: a number in [0, 1) for each other one.
        end: the token that ends a text. Nothing is chosen after it.
        counts: (3,) int64: how many tokens were chosen, how many were read, and how many blocks ran. A number of -1
            chosen tokens tells that logits are not finite.
    """
    last, weights = x[at : at + len(logits)], np.empty(len(logits))
    last[:] = logits
    counts[:] = 0
    for i in range(len(tokens)):
        if i >= given:
            tokens[i] = choose(last, random[i - given], temperature, weights)
            counts[0] = i + 1 - given if tokens[i] >= 0 else -1
            if tokens[i] < 0 or tokens[i] == end or i == len(tokens) - 1:
                break
        n[TOKEN] = tokens[i]
        step(code, 0, w, b, table, s, n, x, threads, None)
        counts[1] += 1
        counts[2] += n[BLOCKS]
    logits[:] = last


@jit_on_one_thread
def write_one(code, w, b, table, s, n, x, at, logits, tokens, given, random, temperature, end, counts):
    write(code, w, b, table, s[0], n[0], x[0], at, logits, tokens, given, random, temperature, end, counts, None)


@partial(jit, parallel=False)
def write_one_on_threads(code, w, b, table, s, n, x, at, logits, tokens, given, random, temperature, end, counts):
    """Write with threads that share large matrices."""
    write(code, w, b, table, s[0], n[0], x[0], at, logits, tokens, given, random, temperature, end, counts, True)


@jit
def run(code, w, b, table, s, n, x, ids, ends, groups):
    """Run a program for the next tokens of all rows, ids[ends[row]:ends[row + 1]].

    groups: number of groups of rows; each thread has one at a time.
    """
    for group in prange(groups):
        first, end = len(s) * group // groups, len(s) * (group + 1) // groups
        places = np.empty(end - first, np.int64)
        most = (ends[first + 1 : end + 1] - ends[first:end]).max()
        for i in range(most):
            for row in range(first, end):
                unread = ends[row] + i < ends[row + 1]
                places[row - first] = 0 if unread else len(code)
                if unread:
                    n[row, TOKEN] = ids[ends[row] + i]
            step_together(code, w, b, table, s[first:end], n[first:end], x[first:end], places)
