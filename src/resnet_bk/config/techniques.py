"""Settings of the adaptive techniques, one section each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from resnet_bk.config.checks import ConfigError, check_choices, check_integer, check_range, integers

if TYPE_CHECKING:
    from resnet_bk.config.model import ModelConfig


class Technique:
    """Base of the techniques' sections.

    A section is a frozen dataclass derived from this class. ModelConfig has one field of each such type. A technique
    must be off with the default values of its section.
    """

    def is_on(self, model: "ModelConfig") -> bool:
        """Return True if `model`, whose section this is, uses the technique."""
        return self != type(self)()

    def fields_when_off(self, model: "ModelConfig") -> dict[str, Any]:
        """Return what changes in ModelConfig, besides this section, to switch the technique off: fields and values."""
        return {}

    @property
    def needs_host_sync(self) -> bool:
        """True if the host must read decisions of the technique to know the shape of a tensor."""
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
class MemoryConfig(Technique):
    """N-gram memory: what followed the last few tokens, in the training text or earlier in the same text, looked up."""

    orders: tuple[int, ...] = ()
    """Numbers of tokens that are looked up, in ascending order. [1, 2, 3, 4, 6, 8, 12, 16] suits bytes. Empty: off."""
    rows: int = 262_144
    """Number of entries of the table, for all orders. What occurred most often stays. An entry takes
    4 (1 + successors) bytes in the saved model; each process of a training has up to five tables in memory.
    `resnet-bk train` makes at most one entry for each token of the training text."""
    successors: int = 4
    """Number of next tokens in an entry, the most frequent ones."""
    recent: tuple[int, ...] = ()
    """Numbers of tokens that are looked up in the text so far, in ascending order: what followed them the last time.
    [2, 3, 4, 6, 8, 12] suits bytes. Empty: off."""
    recent_rows: int = 16_384
    """Number of entries of the table of the text so far, for all of these numbers. What came last stays. An entry takes
    8 bytes in the state of each sequence."""

    def __post_init__(self) -> None:
        where = "model.memory"
        for name in ("orders", "recent"):
            orders = integers(where, name, getattr(self, name), 1, 64)
            object.__setattr__(self, name, orders)
            if list(orders) != sorted(set(orders)):
                raise ConfigError(f"{where}.{name}: got {list(orders)}, allowed different lengths in ascending order")
        check_integer(where, 1, 2**24, rows=self.rows, recent_rows=self.recent_rows)
        check_integer(where, 1, 64, successors=self.successors)

    def is_on(self, model: "ModelConfig") -> bool:
        return bool(self.orders or self.recent)


@dataclass(frozen=True)
class MultiScaleConfig(BoundedTechnique):
    """Multi-scale: stacks that run on chunks of neighbouring positions instead of on all positions."""

    factors: tuple[int, ...] = ()
    """Positions per chunk at each level, outermost first: [2, 2] makes levels of N/2 and N/4 positions. With
    boundaries 'learned' a factor is the mean aimed at, with 'whitespace' half of the longest chunk. Empty: off."""
    layers: tuple[int, ...] = ()
    """Numbers of blocks in the order in which they run: before each level, in the innermost level, after each level.
    [1, 1, 4, 1, 1] for two factors. Default: 1 before and 1 after each level, the rest of n_layers in the innermost."""
    widths: tuple[int, ...] = ()
    """Model width of each level, outermost first. Default: d_model."""
    hidden: tuple[int, ...] = ()
    """Hidden width of the feed-forwards of each level, outermost first. Default: in proportion to the level's width if
    d_ff is set, else the default of d_ff at that width."""
    boundaries: Literal["fixed", "whitespace", "learned", "learned-words"] = "fixed"
    """Where chunks end. 'fixed': every `factor` positions. 'whitespace': at the first byte after a word (letters,
    digits, _ and non-ASCII bytes), at line ends and at document ends. 'learned': where a trained router decides, on
    average about `factor` positions apart. 'learned-words': the same, with a router that starts as 'whitespace'. No
    chunk is longer than twice its factor. Boundaries at words need the byte tokenizer."""
    ratio_weight: float = 0.1
    """Only with learned boundaries: weight of the loss that holds their mean distance at the factor."""
    bound: float | None = None
    """Caps the number of chunks in a row, as a fraction of the positions that a level is made from. With a bound,
    shapes do not depend on the text, as torch.compile and CUDA graphs need it. A row that exceeds it (rounded up to a
    multiple of 16) raises an error. Default: no cap, but one host-device sync per packing. With fixed boundaries only
    decoding steps need a bound, and any value fits."""

    def __post_init__(self) -> None:
        where = "model.multiscale"
        check_choices(where, self)
        for name, low, high in (
            ("factors", 2, 65_536),
            ("layers", 0, 1_024),
            ("widths", 1, 65_536),
            ("hidden", 1, 2**20),
        ):
            object.__setattr__(self, name, integers(where, name, getattr(self, name), low, high))
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
            raise ConfigError(f"{where}.layers: got 0 blocks in the innermost level, allowed at least 1")
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
    """Number of lengths to choose from; the longest is max_length. 0: off."""
    max_length: int | None = None
    """Number of positions in a window. Each window has its own length. Default: n_seq."""
    mode: Literal["truncate", "pool"] = "truncate"
    """Which positions of a window run all blocks. 'truncate': the first ones. 'pool': about as many, spread over the
    window; each also gets a learned part of the mean of the positions since the last one."""
    trunk: int | None = None
    """Number of layers at the beginning that every position runs; the whole stack on chunks counts as one layer.
    Default: a quarter of all layers, at least one."""
    placement: Literal["even", "geometric", "learned", "continuous"] = "even"
    """Lengths to choose from. 'even': evenly spaced. 'geometric': geometrically spaced. 'learned': evenly spaced at
    first, then learned. 'continuous': any number, predicted directly and rounded to a multiple of max_length / bins."""
    levels: Literal[1, 2] = 1
    """1: one choice from all lengths. 2: the probability of a length is that of its group times that within the
    group."""
    pooling: Literal["prefix", "attention", "global"] = "prefix"
    """Input of the choice. 'prefix': the mean over the window's first positions, as many as the shortest length has.
    'attention': a mean over the same positions, weighted by content. 'global': the mean over the whole window, in
    bidirectional models only, which need it."""
    spacing: Literal["even", "words"] = "even"
    """Only with mode 'pool': the position that is kept of each stretch. 'even': the last one. 'words': the first one
    at which a word of bytes ends, or the last one if no word ends there."""
    training: Literal["expected", "sampled", "gumbel"] | None = None
    """Loss in training. 'expected' (the default with mode 'truncate'): the expected loss over all lengths. 'gumbel':
    the loss of one Gumbel-Softmax sample per window. Both run all blocks on every position, and are exact for causal
    models on sequences of one window. 'sampled' (always with mode 'pool'): one length is drawn per window, and only
    the positions that it keeps run all blocks."""
    temperature: float = 1.0
    """Only with training 'gumbel': temperature of the Gumbel-Softmax."""
    penalty: float = 0.01
    """Weight in the loss of the mean expected length, as a share of max_length."""
    entropy_weight: float = 0.01
    """Weight of the bonus for the entropy of the choices, which keeps them from collapsing to one length early."""
    execution: Literal["grouped", "batch_max"] = "grouped"
    """How the rows of a batch run. 'grouped': in groups of similar length. 'batch_max': all at the longest length.
    Outputs are the same, up to rounding."""

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
                "mode = 'truncate' and another training than 'sampled'"
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
        """True if training draws one length per window and runs all blocks only on the positions that it keeps."""
        return self.mode == "pool" or self.training == "sampled"

    @property
    def groups(self) -> int:
        """Number of groups with two levels: the smallest divisor of bins that is at least its square root."""
        return next(g for g in range(1, self.bins + 1) if g * g >= self.bins and self.bins % g == 0)


@dataclass(frozen=True)
class DepthConfig(BoundedTechnique):
    """Adaptive depth: how many blocks each position runs."""

    policy: Literal["none", "act", "skip", "exit"] = "none"
    """How many blocks a position runs. 'none': all. 'act' (adaptive computation time): until its halting probabilities
    add up to the threshold. 'skip' (mixture of depths): before each segment a router decides whether the position runs
    or skips it. 'exit' (early exit): until its confidence about the next token reaches the threshold."""
    first: int = 1
    """Number of blocks before the first decision, which every position runs. With 0 and early exit, n-gram memory alone
    may decide."""
    last: int = 1
    """Only with policies 'act' and 'skip': number of blocks at the end, which every position runs."""
    every: int = 1
    """Number of blocks from one decision to the next: the length of a segment."""
    threshold: float | None = None
    """'act': sum of halting probabilities at which a position stops, default 0.5. 'skip', outside training: probability
    from which it runs a segment, default 0.5. 'exit', outside training: confidence at which it stops, default 0.95 for
    'gain', else 0.9; at 1 no position stops."""
    penalty: float = 0.3
    """Only with policies 'act' and 'skip': weight of the penalty, which is the expected share of blocks."""
    target: float = 0.5
    """Only with policies 'act' and 'skip': target for the share of blocks that run. The penalty is multiplied by
    (share - target) / 0.1, limited to -1 and 1, so that depth collapses neither to the first blocks nor to all. 0: the
    full penalty at any share above 0.1."""
    confidence: Literal["gain", "probability", "entropy"] = "gain"
    """Only with policy 'exit': measure of confidence. 'gain': a unit predicts by how many nats the later blocks would
    lower the loss; the confidence is exp(-gain): 0.95 means that they would lower the perplexity by 5%. 'probability':
    that of the most likely token. 'entropy': 1 - entropy / largest entropy."""
    exit_weight: float = 0.3
    """Only with policy 'exit': weight of the mean loss of the exits."""
    full_depth: float = 0.5
    """Only with policy 'exit': share of the training sequences that run all blocks. In each other sequence, positions
    stop at a confidence that is drawn for it, from 0.9 ('gain') or 0.5 up to 1. So any threshold in this range can be
    chosen later."""
    bound: float | None = None
    """Caps the number of positions in a row that run the segment after a decision, as a fraction of all positions: see
    multiscale.bound."""

    def __post_init__(self) -> None:
        where = "model.depth"
        check_choices(where, self)
        check_integer(where, 1, 1_024, every=self.every)
        check_integer(where, 0, 1_024, first=self.first, last=self.last)
        check_range(where, 0, 1_000, penalty=self.penalty, exit_weight=self.exit_weight)
        check_range(where, 0, 1, target=self.target, full_depth=self.full_depth)
        check_bound(where, self.bound)
        if self.threshold is not None:
            check_range(where, 0, 1, threshold=self.threshold)

    def is_on(self, model: "ModelConfig") -> bool:
        return self.policy != "none"

    @property
    def after(self) -> int:
        """Number of blocks at the end that every position runs; 0 with early exit, which goes straight to the head."""
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
    """Weight of the loss that holds the share of left-out sites of each mixer at the target. The loss is the mean
    probability to keep a site, times (target - share) / 0.02, limited to -4 and 4."""
    warmup: float = 0.3
    """First part of training, as a share, during which the target rises from 0."""
    bound: float | None = None
    """Caps the number of kept sites in a row, as a fraction of all sites: see multiscale.bound. Before training nearly
    every site is kept, so training needs a bound of about 1 at first."""

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
    """Which experts a token uses. 'top_k': the top_k most likely ones. 'top_p': the fewest of the most likely ones
    whose probabilities sum to top_p or more: one if the router is sure, several if it is not."""
    top_p: float = 0.5
    """Only with policy 'top_p': the least sum of the probabilities of a token's experts, unless `most` is reached."""
    least: int = 1
    """Only with policy 'top_p': smallest number of experts per token, including those that compute nothing."""
    most: int = 4
    """Only with policy 'top_p': largest number of experts per token, or all experts if there are fewer."""
    target: float = 1.5
    """Only with policy 'top_p': target for the mean number of computing experts per token. The cost is multiplied by
    (mean - target) / 0.25, limited to -1 and 1. 0: the full cost at any number."""
    cost_weight: float = 0.1
    """Only with policy 'top_p': weight of the cost in the loss. The cost is the router's entropy, as a share of the
    largest entropy, plus the sum of the probabilities of the computing experts."""
    identity: int = 0
    """Number of additional experts that return their input without computing."""
    zero: int = 0
    """Number of additional experts that return zero without computing."""
    balance: Literal["auxiliary", "bias"] = "auxiliary"
    """How the load of the computing experts is balanced. 'auxiliary': a loss on the router. 'bias': a bias that falls
    while an expert has more than its share; it affects which and how many experts are chosen, not their gates."""

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
