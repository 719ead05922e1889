"""The instructions of the engine's programs: rows of whole numbers, an opcode and its operands.

An operand named x is the offset of a vector in the scratch memory, w in the weights, s in the numbers and n in the
whole numbers of the state. `to` is the row to go on with.
"""

from enum import IntEnum, auto

OPERANDS = 16  # at most


class Op(IntEnum):
    """Opcodes. The comments name their operands."""

    EMBED = auto()  # x, w, width, w of scales or -1: x = the vector of the token
    # x, n of the last tokens, their number, w of the orders, their number, w of gain, level_vectors, token_vectors and
    # scale, width: x += what the table has
    NGRAMS = auto()
    RECENT = auto()  # as NGRAMS, then n of the table, number of its entries, vocabulary; the token enters it
    COPY = auto()  # x, from, width
    ADD = auto()  # x, from, width: x += from
    SUBTRACT = auto()  # x, from, width
    NORM = auto()  # x, from, width, w: LayerNorm without bias
    LINEAR = auto()  # x, from, inner, outer, w, w of the bias or -1
    LINEAR_OF_BYTES = auto()  # as LINEAR, then w of scales; the matrix is in the bytes
    SILU = auto()  # x in place, width
    SIGMOID = auto()  # x in place, width
    SCORE = auto()  # x, from, width, w, w of a and b: x = a <from, w> + b
    CONV = auto()  # x in place, width, taps, w, s
    QUERIES = auto()  # q, k, heads, width, softened: q / sqrt(width), and k / sqrt(1 + |k|^2) if softened
    BONDS = auto()  # potentials in place, heads, w of the bias: x = alpha
    REAL = auto()  # potentials, heads, w of z, s of g: x = alpha, beta
    COMPLEX = auto()  # potentials, heads, w of z, s of g: x = decays, angles, weights, angles of the weights
    ROTATE = auto()  # x in place, heads, width, x of angles
    ROTATE_STATE = auto()  # s in place, heads, width, padded width of values, x of angles
    SCAN = auto()  # q, k, v, alpha, beta, y, heads, width, width of values, s, with the delta rule
    LEFT_OUT = auto()  # v, alpha, beta, y, heads, width, width of values, s, s of the last read, w of fill and own
    GREEN = auto()  # potentials, heads, w of z, s of g, complex, x of features, w of fill; -1: the site is kept
    GATED_NORM = auto()  # x in place, gate, heads, width, w
    GATE = auto()  # x in place, from, gate, width: x = (x + from) silu(gate)
    ATTEND = auto()  # q k v, y, heads, width, window, s, w of cosines and sines, x of scores
    SWIGLU = auto()  # x in place, width
    # x, from, logits, D, F, computing, identity and all experts, most and least, w of top_p or -1, w of the bias or -1,
    # matrices up and down, scratch memory, w of scales or -1
    EXPERTS = auto()
    COUNT = auto()  # blocks
    JUMP = auto()  # to
    UNLESS_POSITIVE = auto()  # x, to
    POOL = auto()  # from, width, x of the weight or -1, s: s += [from, 1] sigmoid(weight)
    MEAN = auto()  # x, width, s, anew: the mean of a pool, which then begins anew
    # kind, score, n of since, n of the last token, factor, longest, w of trust or -1, x of certainty, to (stays open)
    BOUNDARY = auto()
    RESULT = auto()  # from, width, s, certainty: s becomes from, or is mixed with it
    CARRIED = auto()  # x in place, width, n of since, w of gains, their number
    ADD_GATED = auto()  # x in place, from, gate, width, w of two scales or -1: x + 2 from sigmoid(gate)
    HALT_START = auto()  # out, left, width
    HALT = auto()  # x, out, left, score, width, s of the threshold, to (stops)
    HALT_END = auto()  # x in place, out, left, width
    SKIP = auto()  # score, s of the threshold, to (skipped)
    EXIT = auto()  # kind, score or logits, vocabulary, s of the threshold, to (exits)
    WINDOW = auto()  # x, width, x of the weight or -1, n, s, prefix, needed, size, to (no choice is due)
    CHOOSE = auto()  # scores, w of lengths, n, kind, groups, number of lengths, shortest, longest
    KEEP = auto()  # n, size, shortest, spread, by words, to (not kept)
    SET_SINCE = auto()  # n, kept
    LOAD = auto()  # x, width, s
    STORE = auto()  # x, width, s
    END_OF_POSITION = auto()  # n, s of the pool, width, size, shortest
