"""The instructions of token mixers, as functions on flat arrays, see :mod:`resnet_bk.engine.layers`."""

import math

import numpy as np

from resnet_bk.engine.layers import helper, norm, sigmoid_of, softplus_of, whole_registers
from resnet_bk.jit.simd import LANE_BYTES, load, sigmoid, splat, spread, store


@helper
def conv(w, x, s, u, channels, taps, at, past):
    whole, lanes, _ = whole_registers(x, channels)
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
        g = 1 / (-2 - softplus_of(x[v + h]) - w[shift + h] - s[past + h])
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
            g = 1 / (-2 - softplus_of(x[v + h]) - w[shift + h] - link * s[past + h])
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
def gated_norm(w, x, y, gate, heads, width, at):
    for h in range(heads):
        norm(w, x, y + h * width, y + h * width, width, at)
    whole, lanes, one = whole_registers(x, heads * width)
    for i in range(0, whole, lanes):
        v = load(x, gate + i)
        store(x, y + i, load(x, y + i) * v * sigmoid(v, one))
    for i in range(whole, heads * width):
        x[y + i] *= x[gate + i] * sigmoid_of(x[gate + i])
