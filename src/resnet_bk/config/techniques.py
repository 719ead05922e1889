"""Settings of the adaptive techniques, one section each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from resnet_bk.config.checks import ConfigError, check_choices, check_integer, check_range, shown

if TYPE_CHECKING:
    from resnet_bk.config.model import ModelConfig


class Technique:
    """Base of the techniques' sections.

    A technique is a field of ModelConfig whose type is a frozen dataclass derived from this class. The technique must
    be off in the default of its section.
    """

    def is_on(self, model: "ModelConfig") -> bool:
        """Return True if a model with these settings uses the technique."""
        return self != type(self)()

    def fields_when_off(self, model: "ModelConfig") -> dict[str, Any]:
        """Return the fields of ModelConfig, besides the section, that change when the technique is switched off."""
        return {}

    @property
    def needs_host_sync(self) -> bool:
        """True if the CPU needs a decision of the GPU to know the shape of a tensor."""
        return False


class BoundedTechnique(Technique):
    """A technique that selects positions, with a setting `bound` that caps their number."""

    bound: float | None

    @property
    def needs_host_sync(self) -> bool:
        return self.bound is None


def check_bound(where: str, bound: float | None) -> None:
    if bound is not None:
        check_range(where, 0, 1, bound=bound)


@dataclass(frozen=True)
class MultiScaleConfig(BoundedTechnique):
    """Multi-scale: stacks that run on chunks of neighbouring positions instead of on all positions."""

    factors: tuple[int, ...] = ()
    """Positions per chunk, level by level inward: [4], or [2, 2] for N, N/2, N/4. Empty: all blocks run on all
    positions."""
    layers: tuple[int, ...] = ()
    """Number of blocks before each level from the outside in, innermost, and after each level from the inside out:
    [1, 1, 4, 1, 1] for two factors. Default: one before and one after each level, the rest of n_layers innermost."""
    widths: tuple[int, ...] = ()
    """Model width of each inner level. Default: d_model."""
    hidden: tuple[int, ...] = ()
    """Hidden width of the feed-forwards of each inner level. Default: d_ff scaled with the width, or the default of
    d_ff."""
    boundaries: Literal["fixed", "whitespace", "learned", "learned-words"] = "fixed"
    """Where chunks end. 'fixed': every `factor` positions. 'whitespace': after words and lines of bytes. 'learned':
    where a trained router decides, `factor` positions apart on average. 'learned-words': the same, with a router that
    starts as 'whitespace'. No chunk is longer than twice its factor."""
    ratio_weight: float = 0.1
    """Weight of the loss that holds learned boundaries to their factor."""
    bound: float | None = None
    """Caps the number of chunks, as a fraction of the positions at each level. Exceeding it raises an error; nothing is
    dropped. Shapes then do not depend on the text, which torch.compile and CUDA graphs need. Default: no cap, but one
    host-device sync per packing. Fixed boundaries need a bound in decoding steps only, where any value fits."""

    def __post_init__(self) -> None:
        where = "model.multiscale"
        check_choices(where, self)
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
        """True if the boundaries depend on which bytes the tokens are."""
        return self.boundaries in ("whitespace", "learned-words")


@dataclass(frozen=True)
class LengthConfig(Technique):
    """Learned length: how many positions of each window of text run all blocks."""

    bins: int = 0
    """Number of lengths to choose from, up to max_length. 0: every position runs all blocks."""
    max_length: int | None = None
    """Positions in a window. Each window has its own length. Default: n_seq."""
    mode: Literal["truncate", "pool"] = "truncate"
    """Which positions of a window run all blocks. 'truncate': the first ones. 'pool': about as many, spread over the
    window, each representing those since the last one."""
    trunk: int | None = None
    """Number of first layers, which every position runs. Default: a quarter of all layers, at least one."""
    placement: Literal["even", "geometric", "learned", "continuous"] = "even"
    """Lengths to choose from. 'even': evenly spaced. 'geometric': geometrically spaced. 'learned': even at first, then
    learned. 'continuous': one number, predicted directly and rounded."""
    levels: Literal[1, 2] = 1
    """1: one choice from all lengths. 2: a choice from groups of lengths, then one within the group."""
    pooling: Literal["prefix", "attention", "global"] = "prefix"
    """Input of the choice. 'prefix': the mean over the positions of the shortest length. 'attention': their mean,
    weighted by content. 'global', for bidirectional models: the mean over the whole window."""
    spacing: Literal["even", "words"] = "even"
    """pool: 'even' spreads the positions evenly; 'words' moves each to the first end of a word (of bytes) in its
    stretch."""
    training: Literal["expected", "sampled", "gumbel"] | None = None
    """Loss in training. 'expected' (default with truncate): the expectation over all lengths. 'gumbel': one
    Gumbel-Softmax sample per window. Both compute every position and are exact for sequences of one window. 'sampled'
    (always with pool): one sample per window, and only that is computed."""
    temperature: float = 1.0
    """gumbel: temperature of the Gumbel-Softmax."""
    penalty: float = 0.01
    """Weight of the mean expected share of max_length in the loss."""
    entropy_weight: float = 0.01
    """Weight of the bonus for the entropy of the choices, which keeps them from collapsing to one length early."""
    execution: Literal["grouped", "batch_max"] = "grouped"
    """How the sequences of a batch run. 'grouped': in groups of similar length. 'batch_max': all at the longest length.
    This affects time, not results."""

    def __post_init__(self) -> None:
        where = "model.length"
        check_choices(where, self)
        check_integer(where, 0, 1_024, bins=self.bins)
        if self.max_length is not None:
            check_integer(where, 2, 2**20, max_length=self.max_length)
        if self.trunk is not None:
            check_integer(where, 1, 1_023, trunk=self.trunk)
        check_integer(where, 1, 2, levels=self.levels)
        check_range(where, 1e-3, 1e3, temperature=self.temperature)
        check_range(where, 0, 1_000, penalty=self.penalty, entropy_weight=self.entropy_weight)
        if self.training in ("expected", "gumbel") and self.mode == "pool":
            raise ConfigError(
                f"{where}.training: got {self.training!r} with mode = 'pool', allowed 'sampled': with 'pool', each "
                "length is a computation of its own"
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
        """True if training samples lengths and computes only the samples."""
        return self.mode == "pool" or self.training == "sampled"

    @property
    def groups(self) -> int:
        """Number of groups with two levels: the smallest divisor of bins that is at least its square root."""
        return next(g for g in range(1, self.bins + 1) if g * g >= self.bins and self.bins % g == 0)


@dataclass(frozen=True)
class DepthConfig(BoundedTechnique):
    """Adaptive depth: how many blocks each position runs."""

    policy: Literal["none", "act", "skip", "exit"] = "none"
    """Which positions run a block. 'none': all. 'act' (adaptive computation time): until their halting probabilities
    add up to the threshold. 'skip' (mixture of depths): those that its router lets in; the others skip it. 'exit'
    (early exit): until their confidence about the next token reaches the threshold."""
    first: int = 1
    """Number of blocks before the first decision, which every position runs."""
    last: int = 1
    """act, skip: number of blocks at the end, which every position runs."""
    every: int = 1
    """Number of blocks between decisions."""
    threshold: float | None = None
    """act: sum of halting probabilities at which a position stops, default 0.5. skip: probability at which it enters,
    default 0.5. exit: confidence at which it stops, default 0.95 for 'gain', else 0.9; at 1 no position stops."""
    penalty: float = 0.3
    """act, skip: weight of the expected share of blocks in the loss."""
    target: float = 0.5
    """act, skip: target share of blocks. The penalty grows above it, is 0 at it and negative below it, so that depth
    collapses neither to the first blocks nor to all. 0: the full penalty at any share."""
    confidence: Literal["gain", "probability", "entropy"] = "gain"
    """exit: measure of confidence. 'gain': a unit predicts how much the later blocks would lower the loss; the
    confidence is the share of its perplexity that a position would keep. 'probability': of the most likely token.
    'entropy': 1 - entropy / largest entropy."""
    exit_weight: float = 0.3
    """exit: weight of the mean loss of the exits."""
    full_depth: float = 0.5
    """exit: share of the training sequences that run all blocks. For each other sequence, a confidence at which its
    positions stop is drawn from 0.9 ('gain') or 0.5 to 1, so that any threshold in this range can be chosen later."""
    bound: float | None = None
    """Caps the number of positions that a decision lets run on, as a fraction of all positions: see
    multiscale.bound."""

    def __post_init__(self) -> None:
        where = "model.depth"
        check_choices(where, self)
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
        """Number of blocks at the end that every position runs; 0 with early exit, which leads straight to the head."""
        return 0 if self.policy == "exit" else self.last

    @property
    def stops_at(self) -> float:
        """The threshold, or the policy's default."""
        if self.threshold is not None:
            return self.threshold
        return 0.5 if self.policy in ("act", "skip") else 0.95 if self.confidence == "gain" else 0.9


@dataclass(frozen=True)
class SparsityConfig(BoundedTechnique):
    """Learned sparsity: which sites of a mixer's chains are computed, the same in all heads."""

    target: float = 0.0
    """Share of the sites to leave out. 0: none."""
    sampling: Literal["threshold", "gumbel"] = "threshold"
    """Which sites training keeps. 'threshold': those with an importance above 0, as outside training. 'gumbel': a
    Gumbel-sigmoid sample."""
    penalty: float = 0.3
    """Weight of the loss that holds the sparsity of each mixer at the target: the mean probability to keep a site times
    a price, which is 0 at the target, grows with the share of kept sites, and is negative below."""
    warmup: float = 0.3
    """Share of training in which the target rises from 0."""
    bound: float | None = None
    """Caps the number of kept sites, as a fraction of all sites: see multiscale.bound. Before training nearly every
    site is kept."""

    def __post_init__(self) -> None:
        where = "model.sparsity"
        check_choices(where, self)
        check_range(where, 0, 0.99, target=self.target)
        check_range(where, 0, 1_000, penalty=self.penalty)
        check_range(where, 0, 1, warmup=self.warmup)
        check_bound(where, self.bound)

    def is_on(self, model: "ModelConfig") -> bool:
        return self.target > 0


@dataclass(frozen=True)
class ExpertsConfig(Technique):
    """Conditional experts: how many experts a token uses, and their cost."""

    policy: Literal["top_k", "top_p"] = "top_k"
    """Which experts a token uses. 'top_k': the top_k most likely ones. 'top_p': as many of the most likely ones as make
    up a probability of top_p: one if the router is sure, several if it is not."""
    top_p: float = 0.5
    """top_p: the probability that a token's experts make up."""
    least: int = 1
    """top_p: smallest number of experts per token, including those that compute nothing."""
    most: int = 4
    """top_p: largest number of experts per token, limited to all there are."""
    target: float = 1.5
    """top_p: target for the mean number of computing experts per token. The cost grows above it, is 0 at it and
    negative below it. 0: the full cost at any number."""
    cost_weight: float = 0.1
    """top_p: weight of the cost, which is the router's entropy as a share of the largest entropy, plus the probability
    of experts that compute."""
    identity: int = 0
    """Number of additional experts that return their input without computing."""
    zero: int = 0
    """Number of additional experts that return zero without computing."""
    balance: Literal["auxiliary", "bias"] = "auxiliary"
    """How the load of the computing experts is balanced. 'auxiliary': a loss on the router. 'bias': a bias that follows
    the load and affects the choice of experts, not their gates."""

    def __post_init__(self) -> None:
        where = "model.experts"
        check_choices(where, self)
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
