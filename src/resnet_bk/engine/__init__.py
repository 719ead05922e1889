"""Models compiled for decoding on CPUs: a program that numba runs, one call a token of each row.

``compiler.py`` turns a model's layers into the rows of a program, ``interpreter.py`` runs it, ``engine.py`` makes
states and steps, ``conversion.py`` takes states from the model and back, and ``decoder.py`` decides where the engine is
used. Only the compiler, the conversion and the decoder import torch.
"""
