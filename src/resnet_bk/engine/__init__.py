"""Models compiled for decoding on CPUs: a program that numba runs, one call a token of each row.

``compiler.py`` turns a model's layers into the rows of a program, ``interpreter.py`` runs it, ``engine.py`` makes and
converts states, and ``decoder.py`` decides where the engine is used.
"""

from resnet_bk.engine.decoder import Decoder, decoder_of
from resnet_bk.engine.state import EngineState

__all__ = ["Decoder", "EngineState", "decoder_of"]
