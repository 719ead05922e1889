"""The shape of a model: one section for each technique."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from resnet_bk.config.checks import (
    ConfigError,
    check_boolean,
    check_choice,
    check_fields,
    check_integer,
    check_range,
    shown,
)

# The byte tokenizer: byte b is id b + 3, after three special ids, of which one ends documents.
BYTE_OFFSET, BYTE_VOCABULARY, END_OF_DOCUMENT = 3, 259, 1


@dataclass(frozen=True)
class MultiScaleConfig:
    """Stacks that run on chunks of neighbouring positions instead of on all of them."""

    factors: tuple[int, ...] = ()
    """Positions a chunk, level by level inward: [4], or [2, 2] for N, N/2, N/4. Empty: all blocks see all positions."""
    layers: tuple[int, ...] = ()
    """Blocks: outer before, ..., innermost, ..., outer after, as [1, 1, 4, 1, 1] for two factors. Default: one block
    before and one after each level, the rest of n_layers innermost."""
    widths: tuple[int, ...] = ()
    """Model width of each inner level. Default: d_model."""
    hidden: tuple[int, ...] = ()
    """Hidden width of each inner level's feed-forwards. Default: in proportion to d_ff, or its default."""
    boundaries: Literal["fixed", "whitespace", "learned", "learned-words"] = "fixed"
    """Where chunks end: every `factor` positions; after words and lines of bytes; where a trained router says, `factor`
    positions apart on average; where a router says that starts as whitespace. No chunk is longer than twice its
    factor."""
    ratio_weight: float = 0.1
    """Weight of the loss that holds learned boundaries to their factor."""

    def __post_init__(self) -> None:
        where = "model.multiscale"
        for name, low, high in (
            ("factors", 2, 65_536),
            ("layers", 0, 1_024),
            ("widths", 1, 65_536),
            ("hidden", 1, 2**20),
        ):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ConfigError(f"{where}.{name}: got {shown(values)}, allowed a list of integers")
            check_integer(where, low, high, **{f"{name}[{i}]": value for i, value in enumerate(values)})
            object.__setattr__(self, name, tuple(values))
        check_choice(where, ("fixed", "whitespace", "learned", "learned-words"), boundaries=self.boundaries)
        check_range(where, 0, 1_000, ratio_weight=self.ratio_weight)
        levels = len(self.factors)
        if levels > 8:
            raise ConfigError(f"{where}.factors: got {levels} levels, allowed at most 8")
        if self.layers and len(self.layers) != 2 * levels + 1:
            raise ConfigError(
                f"{where}.layers: got {len(self.layers)} numbers for {levels} factors, allowed {2 * levels + 1}: "
                "outer before, ..., innermost, ..., outer after"
            )
        if self.layers and self.layers[levels] < 1:
            raise ConfigError(f"{where}.layers: got no block innermost, allowed at least 1")
        for name in ("widths", "hidden"):
            if (given := len(getattr(self, name))) not in (0, levels):
                raise ConfigError(f"{where}.{name}: got {given} numbers for {levels} factors, allowed one for each")
        if self.reads_bytes and levels > 1:
            raise ConfigError(f"{where}.boundaries: got {self.boundaries!r} for {levels} factors, allowed for one only")

    @property
    def reads_bytes(self) -> bool:
        """Whether boundaries depend on which bytes the tokens are."""
        return self.boundaries in ("whitespace", "learned-words")


@dataclass(frozen=True)
class LengthConfig:
    """Learned sequence length: in each window of text, how many positions go through all blocks."""

    bins: int = 0
    """Lengths to choose among, up to max_length; 0: every position goes through all blocks."""
    max_length: int | None = None
    """Positions of a window; each window has its own length. Default: n_seq."""
    mode: Literal["truncate", "pool"] = "truncate"
    """Which positions go deep: the first of the window, or about as many spread over it, each for those since the last
    one."""
    trunk: int | None = None
    """Layers that every position goes through, the first ones. Default: a quarter of them, at least one."""
    placement: Literal["even", "geometric", "learned", "continuous"] = "even"
    """Lengths: evenly spaced, geometrically spaced, evenly at first and then learned, or a number predicted directly
    and rounded."""
    levels: Literal[1, 2] = 1
    """2: a coarse choice among groups of lengths, then a fine one in the group."""
    pooling: Literal["prefix", "attention", "global"] = "prefix"
    """What the choice is made from: the mean over the shortest length's positions, a mean weighted by content, or, in
    bidirectional models, the mean over the whole window."""
    spacing: Literal["even", "words"] = "even"
    """Pooled: spread evenly, or each at the first end of a word (of bytes) in its stretch."""
    training: Literal["expected", "sampled", "gumbel"] | None = None
    """Truncating: the expected loss over all lengths (default), or that of one Gumbel-Softmax sample per window, both
    with every position computed, so exact for sequences of one window; or, and always when pooling, one sample per
    window with only that computed."""
    temperature: float = 1.0
    """Of the Gumbel-Softmax."""
    penalty: float = 0.01
    """Weight of the mean expected length, as a share of max_length, in the loss."""
    entropy_weight: float = 0.01
    """Weight of the bonus for undecided choices, which keeps them from collapsing to one length early."""
    execution: Literal["grouped", "batch_max"] = "grouped"
    """Sequences of a batch run in groups of equal length, or all at the longest one's. Changes time, not results."""

    def __post_init__(self) -> None:
        where = "model.length"
        check_integer(where, 0, 1_024, bins=self.bins)
        if self.max_length is not None:
            check_integer(where, 2, 2**20, max_length=self.max_length)
        if self.trunk is not None:
            check_integer(where, 1, 1_023, trunk=self.trunk)
        check_integer(where, 1, 2, levels=self.levels)
        check_choice(where, ("truncate", "pool"), mode=self.mode)
        check_choice(where, ("even", "geometric", "learned", "continuous"), placement=self.placement)
        check_choice(where, ("prefix", "attention", "global"), pooling=self.pooling)
        check_choice(where, ("even", "words"), spacing=self.spacing)
        if self.training is not None:
            check_choice(where, ("expected", "sampled", "gumbel"), training=self.training)
        check_choice(where, ("grouped", "batch_max"), execution=self.execution)
        check_range(where, 1e-3, 1e3, temperature=self.temperature)
        check_range(where, 0, 1_000, penalty=self.penalty, entropy_weight=self.entropy_weight)
        if self.training in ("expected", "gumbel") and self.mode == "pool":
            raise ConfigError(
                f"{where}.training: got {self.training!r} with mode = 'pool', allowed 'sampled': pooled, each length "
                "is a computation of its own"
            )
        if self.placement == "continuous" and self.levels == 2:
            raise ConfigError(f"{where}.levels: got 2 with placement = 'continuous', allowed 1: there are no bins")
        if self.placement == "continuous" and self.training == "gumbel":
            raise ConfigError(f"{where}.training: got 'gumbel' with placement = 'continuous', allowed 'expected'")
        if self.spacing == "words" and self.mode == "truncate":
            raise ConfigError(f"{where}.spacing: got 'words' with mode = 'truncate', allowed with 'pool'")
        if self.placement in ("learned", "continuous") and self.sampled:
            raise ConfigError(
                f"{where}.placement: got {self.placement!r} where lengths are sampled in training, allowed with "
                "mode = 'truncate' and another training"
            )
        if self.levels == 2 and self.bins and self.groups == self.bins:
            raise ConfigError(f"{where}.bins: got {self.bins} with levels = 2, allowed a product of two numbers")

    @property
    def sampled(self) -> bool:
        """Whether training samples lengths, and computes those only."""
        return self.mode == "pool" or self.training == "sampled"

    @property
    def groups(self) -> int:
        """Of two levels, how many the first chooses among: the least divisor of bins that is at least its root."""
        return next(g for g in range(1, self.bins + 1) if g * g >= self.bins and self.bins % g == 0)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a language model."""

    vocab_size: int = BYTE_VOCABULARY
    """Number of token ids. 259 is the byte tokenizer: 3 special ids and 256 bytes."""
    d_model: int = 64
    """Width of the residual stream."""
    n_layers: int | None = None
    """Number of blocks, at all scales together. Default: as many as multiscale.layers names, else 4."""
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
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    causal: bool = True
    """Each position sees only its past. False: the full resolvent, for bidirectional encoders."""
    balance_weight: float = 0.01
    """Weight of the experts' load-balancing loss."""
    multiscale: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    length: LengthConfig = field(default_factory=LengthConfig)

    def __post_init__(self) -> None:
        where = "model"
        check_integer(where, 1, 10_000_000, vocab_size=self.vocab_size)
        check_integer(where, 1, 65_536, d_model=self.d_model)
        check_integer(where, 1, 1_024, n_layers=self.blocks, num_experts=self.num_experts)
        check_integer(where, 1, 16_777_216, n_seq=self.n_seq)
        check_integer(where, 1, self.num_experts, top_k=self.top_k)
        check_integer(where, 1, 64, conv_width=self.conv_width)
        check_choice(where, ("propagator", "diagonal"), readout=self.readout)
        check_choice(where, ("real", "complex"), energy=self.energy)
        check_boolean(where, tie_word_embeddings=self.tie_word_embeddings, causal=self.causal)
        check_range(where, 0, 1_000, balance_weight=self.balance_weight)
        if self.d_ff is not None:
            check_integer(where, 1, 1_048_576, d_ff=self.d_ff)
        if self.n_heads is not None:
            check_integer(where, 1, self.d_model, n_heads=self.n_heads)
        if self.readout == "propagator" and self.d_model % self.heads:
            raise ConfigError(f"model.n_heads: got {self.heads}, allowed a divisor of d_model = {self.d_model}")
        if self.readout == "propagator" and self.energy == "complex" and self.d_model // self.heads % 2:
            width = self.d_model // self.heads
            raise ConfigError(
                f"model.n_heads: got {self.heads}, which makes {self.d_model} / {self.heads} = {width} channels each, "
                "allowed an even number: complex energies pair channels"
            )
        self._check_multiscale()
        if self.length.bins:
            self._check_length()

    def _check_multiscale(self) -> None:
        where, scales = "model.multiscale", self.multiscale
        if scales.factors and not self.causal:
            raise ConfigError(
                f"{where}.factors: got {list(scales.factors)} with model.causal = False, allowed in causal models: "
                "a chunk's result returns to later positions only"
            )
        if scales.layers and sum(scales.layers) != self.blocks:
            raise ConfigError(
                f"{where}.layers: got {sum(scales.layers)} blocks together, allowed model.n_layers = {self.n_layers}; "
                "leave one of the two out"
            )
        if self.blocks < 2 * len(scales.factors) + 1 and not scales.layers:
            raise ConfigError(
                f"{where}.factors: {len(scales.factors)} levels need at least {2 * len(scales.factors) + 1} blocks, "
                f"got model.n_layers = {self.blocks}; raise it or give layers"
            )
        if scales.reads_bytes and self.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"{where}.boundaries: got {scales.boundaries!r} with model.vocab_size = {self.vocab_size}, allowed "
                f"with the byte tokenizer's {BYTE_VOCABULARY} ids"
            )
        if scales.factors:
            try:
                self.inside  # noqa: B018 - raises where the inner levels cannot be built
            except ConfigError as error:
                raise ConfigError(f"{where}.widths: an inner level cannot be built: {error}") from error

    def _check_length(self) -> None:
        where, length = "model.length", self.length
        if self.window < max(2, length.bins):
            raise ConfigError(
                f"{where}.bins: got {length.bins} with max_length = {self.window}, allowed at most one a position, "
                "of 2 or more positions"
            )
        if self.trunk >= self.outer_layers:
            what = "layers, all chunks being one of them" if self.multiscale.factors else "blocks"
            raise ConfigError(
                f"{where}.trunk: got {self.trunk} of {self.outer_layers} {what}, allowed fewer: some must be left "
                "to skip"
            )
        if self.causal == (length.pooling == "global"):
            raise ConfigError(
                f"{where}.pooling: got {length.pooling!r} with model.causal = {self.causal}, allowed "
                + (
                    "'prefix' or 'attention': the mean over all of a window would tell its beginning about its end"
                    if self.causal
                    else "'global': a bidirectional model may look at all of its input"
                )
            )
        if length.mode == "pool" and self.multiscale.factors and self.multiscale.reads_bytes:
            raise ConfigError(
                f"{where}.mode: got 'pool' around multiscale.boundaries = {self.multiscale.boundaries!r}, allowed "
                "around 'fixed' or 'learned': among the positions kept, words cannot be told"
            )
        if length.spacing == "words" and self.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"{where}.spacing: got 'words' with model.vocab_size = {self.vocab_size}, allowed with the byte "
                f"tokenizer's {BYTE_VOCABULARY} ids"
            )

    @property
    def window(self) -> int:
        """Positions that share one learned length."""
        return self.length.max_length or self.n_seq

    @property
    def trunk(self) -> int:
        """Layers before those that learned length skips, or its default."""
        return self.length.trunk or max(1, self.outer_layers // 4)

    @property
    def outer_layers(self) -> int:
        """Layers of the outermost stack: blocks, and one for the stack on chunks if there is one."""
        return sum(self.around) + bool(self.multiscale.factors)

    @property
    def heads(self) -> int:
        if self.n_heads is not None:
            return self.n_heads
        if self.readout == "diagonal":
            return max(1, self.d_model // 2)
        multiple = 2 if self.energy == "complex" else 1  # of channels a head
        return next((h for h in range(max(1, self.d_model // 32), 0, -1) if self.d_model % (multiple * h) == 0), 1)

    @property
    def d_hidden(self) -> int:
        return self.d_ff or -(-8 * self.d_model // 24) * 8

    @property
    def blocks(self) -> int:
        """n_layers, or its default."""
        return self.n_layers if self.n_layers is not None else sum(self.multiscale.layers) or 4

    @property
    def around(self) -> tuple[int, int]:
        """Blocks before and after the inner levels; all before where there are none."""
        if not self.multiscale.factors:
            return self.blocks, 0
        layers = self.multiscale.layers
        return (layers[0], layers[-1]) if layers else (1, 1)

    @property
    def inside(self) -> "ModelConfig":
        """The model at the next coarser level."""
        scales = self.multiscale
        levels = dataclasses.replace(
            scales,
            factors=scales.factors[1:],
            layers=scales.layers[1:-1],
            widths=scales.widths[1:],
            hidden=scales.hidden[1:],
        )
        width = scales.widths[0] if scales.widths else self.d_model
        hidden = None if self.d_ff is None else max(1, round(self.d_ff * width / self.d_model))
        hidden = scales.hidden[0] if scales.hidden else hidden
        blocks = self.blocks - sum(self.around)
        return dataclasses.replace(
            self, d_model=width, d_ff=hidden, n_layers=blocks, multiscale=levels, length=LengthConfig()
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        check_fields("model", cls, values)
        rooms: dict[str, Any] = {}
        for name, kind in (("multiscale", MultiScaleConfig), ("length", LengthConfig)):
            given = values.get(name, {})
            rooms[name] = kind(**given) if isinstance(given, dict) else given
        return cls(**{**values, **rooms})
