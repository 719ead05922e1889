"""Settings of a model. The docstring of a field is its help text."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from resnet_bk.config.checks import (
    ConfigError,
    check_choices,
    check_fields,
    check_integer,
    check_range,
    is_section,
)
from resnet_bk.config.techniques import (
    DepthConfig,
    ExpertsConfig,
    LengthConfig,
    MemoryConfig,
    MultiScaleConfig,
    SparsityConfig,
    Technique,
)

# Of the byte tokenizer: byte b is id b + 3, after three special ids. One of these ends a document.
BYTE_OFFSET, BYTE_VOCABULARY, END_OF_DOCUMENT = 3, 259, 1


@dataclass(frozen=True)
class AttentionConfig:
    """Attention within a sliding window, in place of the chain of some blocks."""

    every: int = 0
    """In every k-th block of a stack, attention replaces the chain: with 2, in the second, the fourth, ... With
    multi-scale, each level counts its own blocks. 0: in none."""
    window: int = 128
    """Number of positions that a position reads: itself and those before it. With multi-scale, positions of the level:
    in a stack on chunks, chunks. The state of a block keeps window - 1 positions."""

    def __post_init__(self) -> None:
        check_integer("model.attention", 0, 1_024, every=self.every)
        check_integer("model.attention", 1, 65_536, window=self.window)

    def at(self, i: int) -> bool:
        """Return True if block i of a stack, counted from 0, has attention."""
        return self.every > 0 and (i + 1) % self.every == 0


@dataclass(frozen=True)
class ModelConfig:
    """Settings of a language model."""

    vocab_size: int = BYTE_VOCABULARY
    """Number of token ids. 259 fits the byte tokenizer: 3 special ids and 256 bytes."""
    d_model: int = 64
    """Width of the residual stream."""
    n_layers: int | None = None
    """Number of blocks, summed over all scales. Default: the sum of multiscale.layers if given, else 4."""
    n_seq: int = 128
    """Sequence length in training. Not a limit: the model runs at any length."""
    num_experts: int = 1
    """Number of experts in each feed-forward. 1 is a plain SwiGLU."""
    top_k: int = 1
    """Number of experts that each token uses, unless experts.policy adapts it to the token."""
    readout: Literal["propagator", "diagonal"] = "propagator"
    """Readout of the mixers. 'propagator': the chain's propagator, applied to q, k and v. 'diagonal': the chain's
    Green's function, as features."""
    energy: Literal["bonds", "real", "complex"] | None = None
    """Kind of the chains. 'bonds': the data decide the hopping (decay, and the delta rule: a site writes the part of
    its value that the chain does not return for its key yet). 'real': the data decide the energies, outside the
    spectrum (decay). 'complex': z is complex (decay and rotation). Default: 'bonds' where they are allowed (causal
    models with the propagator, heads of 2 channels or more), else 'real'."""
    shortest_memory: float = 1.0
    """Initial memory of the first head's chain with bonds, in positions. Training changes memories."""
    longest_memory: float = 7.0
    """Initial memory of the last head's chain with bonds, in positions. Memories of the other heads are spaced evenly
    in log scale between the two; a single head has shortest_memory. Short memories learn faster at first; text in which
    what was read must be recalled needs longer ones."""
    n_heads: int | None = None
    """Number of chains per mixer. Default: for the propagator, a divisor of d_model of at most d_model / 32; for the
    diagonal, d_model / 2; at least 1."""
    conv_width: int = 4
    """Width of the short convolution before the core, in positions."""
    d_ff: int | None = None
    """Hidden width of each feed-forward. Default: 8/3 of d_model, rounded up to a multiple of 8."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output head as well."""
    causal: bool = True
    """Each position reads only its past. False: the full resolvent, for bidirectional encoders."""
    balance_weight: float = 0.01
    """Weight of the load-balancing loss of the experts."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    multiscale: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        where = "model"
        check_choices(where, self)
        check_integer(where, 1, 10_000_000, vocab_size=self.vocab_size)
        check_integer(where, 1, 65_536, d_model=self.d_model)
        check_integer(where, 1, 1_024, n_layers=self.blocks, num_experts=self.num_experts)
        check_integer(where, 1, 16_777_216, n_seq=self.n_seq)
        check_integer(where, 1, self.num_experts, top_k=self.top_k)
        check_integer(where, 1, 64, conv_width=self.conv_width)
        check_range(where, 0, 1_000, balance_weight=self.balance_weight)
        check_range(where, 0.1, 1e6, shortest_memory=self.shortest_memory)
        check_range(where, self.shortest_memory, 1e6, longest_memory=self.longest_memory)
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
                "allowed an even number of them: complex energies pair channels"
            )
        if self.energy == "bonds" and not self._allows_bonds:
            raise ConfigError(
                f"model.energy: got 'bonds' with readout = {self.readout!r}, causal = {self.causal} and "
                f"{self.heads} heads, allowed in causal models with the propagator, whose heads have 2 channels or "
                "more at every level"
            )
        if self.energy_kind != "bonds":
            for name in ("shortest_memory", "longest_memory"):
                if getattr(self, name) != getattr(ModelConfig, name):
                    raise ConfigError(
                        f"model.{name}: got {getattr(self, name)} with model.energy = {self.energy_kind!r}, allowed "
                        "with 'bonds'; leave it out"
                    )
        if self.memory.is_on(self):
            check_integer(where, 1, 2**23, vocab_size=self.vocab_size)
        if self.attention.every:
            self._check_attention()
        elif self.attention != AttentionConfig():
            raise ConfigError(
                f"model.attention.window: got {self.attention.window} with model.attention.every = 0, allowed with "
                "attention; leave it out"
            )
        self._check_multiscale()
        if self.attention.every > max(self.stacks):
            raise ConfigError(
                f"model.attention.every: got {self.attention.every} with stacks of at most {max(self.stacks)} blocks, "
                f"allowed 0 to {max(self.stacks)}"
            )
        if self.length.bins:
            self._check_length()
        if self.depth.policy != "none":
            self._check_depth()
        if self.num_experts == 1 and self.experts != ExpertsConfig():
            raise ConfigError("model.experts: no experts to apply this to; raise model.num_experts or leave it out")

    def _check_attention(self) -> None:
        where, heads = "model.attention.every", self.attention_heads
        if not self.causal:
            raise ConfigError(
                f"{where}: got {self.attention.every} with model.causal = False, allowed 0: attention reads "
                "positions before its own only"
            )
        if self.d_model // heads % 2:
            raise ConfigError(
                f"{where}: got {self.attention.every} with heads of {self.d_model} / {heads} = {self.d_model // heads} "
                "channels, allowed with an even number of them: rotations pair channels; change d_model or n_heads"
            )
        if self.attention.every == 1 and self.sparsity.target:
            raise ConfigError(
                f"{where}: got 1 with model.sparsity, allowed 2 or more: learned sparsity needs blocks with chains"
            )

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
                "leave one of the two settings out"
            )
        if self.blocks < 2 * len(scales.factors) + 1 and not scales.layers:
            raise ConfigError(
                f"{where}.factors: {len(scales.factors)} levels need at least {2 * len(scales.factors) + 1} blocks, "
                f"got model.n_layers = {self.blocks}; raise it, or give layers"
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
                f"{where}.bins: got {length.bins} with max_length = {self.window}, allowed at most one per "
                "position, and a window of 2 or more positions"
            )
        if self.trunk >= self.outer_layers:
            what = "layers (all chunks are one layer)" if self.multiscale.factors else "blocks"
            raise ConfigError(
                f"{where}.trunk: got {self.trunk} of {self.outer_layers} {what}, allowed fewer: learned length "
                "skips the others"
            )
        if self.causal == (length.pooling == "global"):
            raise ConfigError(
                f"{where}.pooling: got {length.pooling!r} with model.causal = {self.causal}, allowed "
                + (
                    "'prefix' or 'attention': the mean over a whole window would leak its end to its beginning"
                    if self.causal
                    else "'global': a bidirectional model may read the whole window"
                )
            )
        if length.mode == "pool" and self.multiscale.factors and self.multiscale.reads_bytes:
            raise ConfigError(
                f"{where}.mode: got 'pool' with multiscale.boundaries = {self.multiscale.boundaries!r}, allowed with "
                "'fixed' or 'learned': words cannot be recognized among the kept positions"
            )
        if length.spacing == "words" and self.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"{where}.spacing: got 'words' with model.vocab_size = {self.vocab_size}, allowed with the byte "
                f"tokenizer's {BYTE_VOCABULARY} ids"
            )

    def _check_depth(self) -> None:
        where, depth, blocks = "model.depth", self.depth, self.deciding
        needed = depth.first + depth.after
        if needed > blocks:
            raise ConfigError(
                f"{where}.first: got {needed} blocks for every position, allowed at most {blocks}, those that "
                "adaptive depth drives; lower first or last, or raise the number of blocks"
            )
        if depth.policy == "exit" and not self.causal:
            raise ConfigError(
                f"{where}.policy: got 'exit' with model.causal = False, allowed 'act' or 'skip': a bidirectional model "
                "has no next token to be confident about"
            )
        if depth.policy == "exit" and self.multiscale.factors:
            raise ConfigError(
                f"{where}.policy: got 'exit' with model.multiscale, allowed 'act' or 'skip': chunks have no next token "
                "to be confident about"
            )
        if depth.policy == "exit" and self.length.bins:
            raise ConfigError(
                f"{where}.policy: got 'exit' with model.length, allowed 'act' or 'skip': both define how the output is "
                "scored in training"
            )

    @property
    def deciding(self) -> int:
        """Number of blocks that adaptive depth drives: the innermost stack, or the blocks after the trunk."""
        if self.multiscale.factors:
            return self.inside.deciding
        return self.blocks - (self.trunk if self.length.bins else 0)

    @property
    def window(self) -> int:
        """Positions that share one learned length."""
        return self.length.max_length or self.n_seq

    @property
    def trunk(self) -> int:
        """Number of layers in the trunk of learned length, or its default."""
        return self.length.trunk or max(1, self.outer_layers // 4)

    @property
    def outer_layers(self) -> int:
        """Number of layers in the outermost stack: its blocks, and one for the stack on chunks if there is one."""
        return sum(self.around) + bool(self.multiscale.factors)

    @property
    def heads(self) -> int:
        """n_heads, or its default."""
        if self.n_heads is not None:
            return self.n_heads
        return max(1, self.d_model // 2) if self.readout == "diagonal" else self._wide_heads(self.d_model)

    @property
    def attention_heads(self) -> int:
        """Number of heads of attention: as many as the propagator has chains, or would have by default."""
        return self.heads if self.readout == "propagator" else self._wide_heads(self.d_model)

    def _wide_heads(self, width: int) -> int:
        """Return the most heads of 32 channels or more that divide a width; at least 1."""
        # The channels of a head are a multiple of it: complex energies and rotations of attention pair channels.
        multiple = 2 if self.energy == "complex" or self.attention.every else 1
        return next((h for h in range(max(1, width // 32), 0, -1) if width % (multiple * h) == 0), 1)

    @property
    def energy_kind(self) -> Literal["bonds", "real", "complex"]:
        """energy, or its default; the same at all levels."""
        return self.energy or ("bonds" if self._allows_bonds else "real")

    @property
    def _allows_bonds(self) -> bool:
        levels = (self.d_model, *self.multiscale.widths)
        two_channels = all(width // (self.n_heads or self._wide_heads(width)) > 1 for width in levels)
        return self.readout == "propagator" and self.causal and two_channels

    @property
    def d_hidden(self) -> int:
        """d_ff, or its default."""
        return self.d_ff or -(-8 * self.d_model // 24) * 8

    @property
    def blocks(self) -> int:
        """n_layers, or its default."""
        return self.n_layers if self.n_layers is not None else sum(self.multiscale.layers) or 4

    @property
    def around(self) -> tuple[int, int]:
        """Number of blocks before and after the inner levels; without inner levels, all blocks count as before."""
        if not self.multiscale.factors:
            return self.blocks, 0
        layers = self.multiscale.layers
        return (layers[0], layers[-1]) if layers else (1, 1)

    @property
    def stacks(self) -> list[int]:
        """Number of blocks at each level, from the finest to the coarsest."""
        levels = len(self.multiscale.factors)
        layers = self.multiscale.layers or (1,) * levels + (self.blocks - 2 * levels,) + (1,) * levels
        return [*(layers[i] + layers[-1 - i] for i in range(levels)), layers[levels]]

    @property
    def inside(self) -> "ModelConfig":
        """Settings of the stack at the next coarser level."""
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
            self,
            d_model=width,
            d_ff=hidden,
            n_layers=blocks,
            energy=self.energy_kind,
            attention=self.attention if self.attention.every <= max(self.stacks[1:]) else AttentionConfig(),
            memory=MemoryConfig(),
            multiscale=levels,
            length=LengthConfig(),
        )

    @property
    def techniques(self) -> list[str]:
        """Names of the adaptive techniques that are on."""
        return [name for name in TECHNIQUES if getattr(self, name).is_on(self)]

    @property
    def reads_ids(self) -> list[str]:
        """Settings by which layers read token ids, not only their embeddings."""
        readers = {
            "memory": self.memory.is_on(self),
            "multiscale.boundaries": bool(self.multiscale.factors) and self.multiscale.reads_bytes,
            "length.spacing": bool(self.length.bins) and self.length.spacing == "words",
        }
        return [name for name, reads in readers.items() if reads]

    @property
    def host_syncs(self) -> list[str]:
        """Names of the techniques that are on and need a host-device sync."""
        return [name for name in self.techniques if getattr(self, name).needs_host_sync]

    def without(self, *techniques: str) -> "ModelConfig":
        """Return the same settings with some techniques off: all positions, all blocks, all sites, all experts."""
        changes: dict[str, Any] = {"n_layers": self.blocks}
        for name in techniques:
            changes |= {name: TECHNIQUES[name](), **getattr(self, name).fields_when_off(self)}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        values = without_retired(values)
        check_fields("model", cls, values)
        kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(cls) if is_section(f.type)}
        sections = {name: kind(**values[name]) for name, kind in kinds.items() if isinstance(values.get(name), dict)}
        return cls(**{**values, **sections})


def without_retired(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without `memory.width`, which files of earlier versions have at its default of null."""
    memory = values.get("memory") if isinstance(values, dict) else None
    if not isinstance(memory, dict) or memory.get("orders") or memory.get("width", 0) is not None:
        return values
    return {**values, "memory": {name: value for name, value in memory.items() if name != "width"}}


# The class of each technique's section, by the name of its field.
TECHNIQUES: dict[str, type[Technique]] = {
    f.name: f.type
    for f in dataclasses.fields(ModelConfig)
    if isinstance(f.type, type) and issubclass(f.type, Technique)
}
