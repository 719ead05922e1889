"""The instructions of the engine's programs: rows of whole numbers, an opcode and its operands.

An operand named x is the offset of a vector in the scratch memory, w in the weights, s in the numbers and n in the whole
numbers of the state. `to` is the row to go on with.
"""

from enum import IntEnum, auto

OPERANDS = 16  # at most


class Op(IntEnum):
    """Opcodes. The comments name their operands."""

    EMBED = auto()  # x, w, width, w of scales or -1: x = the vector of the token
    # x, n of the last tokens, their number, w of the orders, their number, w of gain, level_vectors, token_vectors and
    # scale, width: x += what the table has
    NGRAMS = auto()
