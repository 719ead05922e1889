"""Settings of the adaptive techniques, one section each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from resnet_bk.config.checks import ConfigError, check_choice, check_integer, check_range, shown

if TYPE_CHECKING:
    from resnet_bk.config.model import ModelConfig


class Technique:
    """Base of the sections: a field of ModelConfig whose type is a frozen dataclass derived from this is a technique.

    The section's default must be the neutral setting, in which the technique is off.
    """

    def is_on(self, model: "ModelConfig") -> bool:
        """True where a model with these settings uses the technique."""
        return self != type(self)()

    def fields_when_off(self, model: "ModelConfig") -> dict[str, Any]:
        """Fields of ModelConfig, other than the section itself, that change where the technique is switched off."""
        return {}

    @property
    def needs_host_sync(self) -> bool:
        """True where the CPU must wait for a decision of the GPU to know the shape of a tensor."""
        return False


class BoundedTechnique(Technique):
    """A technique that selects positions, with a setting `bound` that caps how many."""

    bound: float | None

    @property
    def needs_host_sync(self) -> bool:
        return self.bound is None


def check_bound(where: str, bound: float | None) -> None:
    if bound is not None:
        check_range(where, 0, 1, bound=bound)


@dataclass(frozen=True)
class MultiScaleConfig(BoundedTechnique):
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
    bound: float | None = None
    """Room for chunks, as a share of the positions at each level. Shapes then do not depend on the text, as
    torch.compile and CUDA graphs need it; more than fit are an error. Default: as many as there are, which the host
    waits to know. Fixed boundaries need no bound but in steps of decoding, where any will do."""

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
        check_bound(where, self.bound)
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

    def is_on(self, model: "ModelConfig") -> bool:
        return bool(self.factors)

    @property
    def reads_bytes(self) -> bool:
        """Whether boundaries depend on which bytes the tokens are."""
        return self.boundaries in ("whitespace", "learned-words")


@dataclass(frozen=True)
class LengthConfig(Technique):
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

    def is_on(self, model: "ModelConfig") -> bool:
        return self.bins > 0

    @property
    def needs_host_sync(self) -> bool:
        return True

    @property
    def sampled(self) -> bool:
        """Whether training samples lengths, and computes those only."""
        return self.mode == "pool" or self.training == "sampled"

    @property
    def groups(self) -> int:
        """Of two levels, how many the first chooses among: the least divisor of bins that is at least its root."""
        return next(g for g in range(1, self.bins + 1) if g * g >= self.bins and self.bins % g == 0)


@dataclass(frozen=True)
class DepthConfig(BoundedTechnique):
    """Adaptive depth: how many blocks each position goes through."""

    policy: Literal["none", "act", "skip", "exit"] = "none"
    """Which positions a block runs on: all; those whose halting probabilities do not add up to the threshold yet
    (adaptive computation time); those its router lets in, the others go past it (mixture of depths); those that the
    later blocks would still help with their next token (early exit)."""
    first: int = 1
    """Blocks before the first decision, which every position goes through."""
    last: int = 1
    """act, skip: blocks after the last decision, which every position goes through."""
    every: int = 1
    """Blocks between decisions."""
    threshold: float | None = None
    """act: the sum of halting probabilities at which a position stops, default 0.5. skip: the probability from which
    it goes in, default 0.5. exit: the confidence from which it stops, default 0.95 of gain, else 0.9; 1 never does."""
    penalty: float = 0.3
    """act, skip: weight of the expected number of blocks, as a share of all there are, in the loss."""
    target: float = 0.5
    """act, skip: share of the blocks to aim at. The penalty counts in full above it, vanishes there, and turns round
    below it, so that depth collapses neither to the first blocks nor to all. 0: always the penalty in full."""
    confidence: Literal["gain", "probability", "entropy"] = "gain"
    """exit: the share of its perplexity that a position keeps if it stops, predicted by a unit that learns what the
    later blocks gain; the likeliest token's probability; or one minus the entropy as a share of the greatest one."""
    exit_weight: float = 0.3
    """exit: weight of the mean loss of the exits."""
    full_depth: float = 0.5
    """exit: share of training sequences that go through all blocks. Positions of the others stop at a confidence drawn
    for each, from 0.9 (of gain) or 0.5 to 1, so that any threshold there can be chosen later."""
    bound: float | None = None
    """Room for positions that go on, as a share of all: see multiscale.bound."""

    def __post_init__(self) -> None:
        where = "model.depth"
        check_choice(where, ("none", "act", "skip", "exit"), policy=self.policy)
        check_choice(where, ("gain", "probability", "entropy"), confidence=self.confidence)
        check_integer(where, 1, 1_024, first=self.first, every=self.every)
        check_integer(where, 0, 1_024, last=self.last)
        check_range(where, 0, 1_000, penalty=self.penalty, exit_weight=self.exit_weight)
        check_range(where, 0, 1, target=self.target, full_depth=self.full_depth)
        check_bound(where, self.bound)
        if self.threshold is not None:
            check_range(where, 0, 1, threshold=self.threshold)

    def is_on(self, model: "ModelConfig") -> bool:
        return self.policy != "none"

    @property
    def after(self) -> int:
        """Blocks that every position goes through at the end: what exits goes straight to the head."""
        return 0 if self.policy == "exit" else self.last

    @property
    def stops_at(self) -> float:
        """The threshold, or the policy's default."""
        if self.threshold is not None:
            return self.threshold
        return 0.5 if self.policy in ("act", "skip") else 0.95 if self.confidence == "gain" else 0.9


@dataclass(frozen=True)
class SparsityConfig(BoundedTechnique):
    """Learned sparsity in the mixers: which sites of their chains are computed, in all heads alike."""

    target: float = 0.0
    """Share of sites to leave out; 0: none."""
    sampling: Literal["threshold", "gumbel"] = "threshold"
    """Sites kept in training: those whose importance is above 0, as always outside it; or a Gumbel-sigmoid sample."""
    penalty: float = 0.3
    """Weight of the loss that holds each mixer's sparsity at the target: of the mean probability to be kept, the more
    the further the share of kept sites is above, vanishing at the target, negative below it."""
    warmup: float = 0.3
    """Share of training over which the target rises from 0."""
    bound: float | None = None
    """Room for kept sites, as a share of all: see multiscale.bound. Before learning nearly every site is kept."""

    def __post_init__(self) -> None:
        where = "model.sparsity"
        check_range(where, 0, 0.99, target=self.target)
        check_choice(where, ("threshold", "gumbel"), sampling=self.sampling)
        check_range(where, 0, 1_000, penalty=self.penalty)
        check_range(where, 0, 1, warmup=self.warmup)
        check_bound(where, self.bound)

    def is_on(self, model: "ModelConfig") -> bool:
        return self.target > 0


@dataclass(frozen=True)
class ExpertsConfig(Technique):
    """Conditional experts: how many of them a token uses, and what they cost."""

    policy: Literal["top_k", "top_p"] = "top_k"
    """The top_k likeliest ones; or as many of the likeliest as make up a probability of top_p: an easy token's router
    is sure of one, a hard one's is not."""
    top_p: float = 0.5
    """top_p: the probability to make up."""
    least: int = 1
    """top_p: experts a token uses at least, those without computation included."""
    most: int = 4
    """top_p: experts a token uses at most, but no more than there are."""
    target: float = 1.5
    """top_p: computing experts a token to aim at on average. The cost counts in full above it, vanishes there, and
    turns round below it. 0: always the cost in full."""
    cost_weight: float = 0.1
    """top_p: weight of the cost, which is the router's entropy as a share of the greatest one, plus the probability of
    experts that compute."""
    identity: int = 0
    """Experts that return what they are given, and compute nothing."""
    zero: int = 0
    """Experts that return nothing, and compute nothing."""
    balance: Literal["auxiliary", "bias"] = "auxiliary"
    """What keeps computing experts equally busy: a loss on the router, or a bias in choosing that follows the load and
    that gates do not contain."""

    def __post_init__(self) -> None:
        where = "model.experts"
        check_choice(where, ("top_k", "top_p"), policy=self.policy)
        check_choice(where, ("auxiliary", "bias"), balance=self.balance)
        check_range(where, 0, 1, top_p=self.top_p)
        check_integer(where, 1, 1_024, most=self.most)
        check_integer(where, 1, self.most, least=self.least)
        check_integer(where, 0, 1_024, identity=self.identity, zero=self.zero)
        check_range(where, 0, self.most, target=self.target)
        check_range(where, 0, 1_000, cost_weight=self.cost_weight)

    def is_on(self, model: "ModelConfig") -> bool:
        return model.num_experts > 1 and (model.top_k < model.num_experts or self != ExpertsConfig())

    def fields_when_off(self, model: "ModelConfig") -> dict[str, Any]:
        return {"top_k": model.num_experts}
