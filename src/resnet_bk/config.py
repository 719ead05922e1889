"""Every setting, typed. A field's docstring is its help text on the command line. Imports nothing heavy."""

import dataclasses
import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal, Self


class ConfigError(ValueError):
    """A setting that cannot be used: says which, what it got, what is allowed."""


def unknown_field(name: str, known: list[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(known))}"
    return ConfigError(f"{where}: unknown field {name!r}; {hint}")


def check_range(where: str, low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{where}.{name}: got {value!r}, allowed {low} to {high}")


def check_integer(where: str, low: int, high: int, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{where}.{name}: got {value!r}, allowed an integer from {low} to {high}")


def check_choice(where: str, allowed: tuple[str, ...], **values: str) -> None:
    for name, value in values.items():
        if value not in allowed:
            raise ConfigError(f"{where}.{name}: got {value!r}, allowed {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a language model."""

    vocab_size: int = 259
    """Number of token ids. 259 is the byte tokenizer: 3 special ids and 256 bytes."""
    d_model: int = 64
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_seq: int = 128
    """Sequence length the model is trained at. Not a limit: any length can be run."""
    num_experts: int = 4
    """Experts in each feed-forward; 1 is a plain SwiGLU."""
    top_k: int = 1
    """Experts each token uses."""
    readout: Literal["propagator", "diagonal"] = "propagator"
    """What is read from the chain: its propagator, applied to q, k, v; or the diagonal of its Green's function."""
    energy: Literal["real", "complex"] = "real"
    """Spectral regime: real z outside the spectrum (pure decay), or complex z (decay and rotation)."""
    n_heads: int | None = None
    """Chains per mixer. Default: d_model / 32 for the propagator, d_model / 2 for the diagonal (at least 1)."""
    conv_width: int = 4
    """Positions the short convolution before the core sees."""
    d_ff: int | None = None
    """Hidden width of each feed-forward. Default: 8/3 d_model, rounded up to a multiple of 8."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    causal: bool = True
    """Each position sees only its past. False: the full resolvent, for bidirectional encoders."""
    balance_weight: float = 0.01
    """Weight of the experts' load-balancing loss."""

    def __post_init__(self) -> None:
        where = "model"
        check_integer(where, 1, 10_000_000, vocab_size=self.vocab_size)
        check_integer(where, 1, 65_536, d_model=self.d_model)
        check_integer(where, 1, 1_024, n_layers=self.n_layers, num_experts=self.num_experts)
        check_integer(where, 1, 16_777_216, n_seq=self.n_seq)
        check_integer(where, 1, self.num_experts, top_k=self.top_k)
        check_integer(where, 1, 64, conv_width=self.conv_width)
        check_choice(where, ("propagator", "diagonal"), readout=self.readout)
        check_choice(where, ("real", "complex"), energy=self.energy)
        check_range(where, 0, 1_000, balance_weight=self.balance_weight)
        if self.d_ff is not None:
            check_integer(where, 1, 1_048_576, d_ff=self.d_ff)
        if self.n_heads is not None:
            check_integer(where, 1, self.d_model, n_heads=self.n_heads)
        if self.readout == "propagator" and self.d_model % self.heads:
            raise ConfigError(f"model.n_heads: got {self.heads}, must divide d_model = {self.d_model}")
        if self.readout == "propagator" and self.energy == "complex" and self.d_model // self.heads % 2:
            width = self.d_model // self.heads
            raise ConfigError(f"model.n_heads: complex energies pair channels, d_model / n_heads must be even, got {width}")

    @property
    def heads(self) -> int:
        if self.n_heads is not None:
            return self.n_heads
        if self.readout == "diagonal":
            return max(1, self.d_model // 2)
        return next(h for h in range(max(1, self.d_model // 32), 0, -1) if self.d_model % h == 0)

    @property
    def d_hidden(self) -> int:
        return self.d_ff or -(-8 * self.d_model // 24) * 8

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_field(name, known, "model")
        return cls(**values)
