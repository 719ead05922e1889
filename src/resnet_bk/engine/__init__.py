"""A model compiled for decoding on CPUs: a program that numba runs, one call a token."""

from resnet_bk.engine.engine import Engine, EngineState

__all__ = ["Engine", "EngineState"]
