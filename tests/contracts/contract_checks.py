"""The contracts that every technique keeps, as checks of a model. Each check raises AssertionError if it is broken.

Dimensions: B batch, N positions.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.layers.feedforward import TILE, Experts, ExpertsRecord
from resnet_bk.layers.mixer import PropagatorMixer
from resnet_bk.layers.score import Score
from resnet_bk.layers.sparse import SparseBKCore, SparsityRecord
from resnet_bk.model import LanguageModel
from resnet_bk.ops.kernels import backend_for


def build(**fields) -> LanguageModel:
    """Return a small float64 model in which every part matters: no parameter keeps an initial value of zero or one."""
    torch.manual_seed(1)
    settings = {"vocab_size": 31, "d_model": 16, "n_seq": 32, "num_experts": 1, "n_heads": 2, **fields}
    settings.setdefault("n_layers", None if "multiscale" in fields else 2)
    model = LanguageModel(**settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, Score):  # decisions start one-sided; here both occur
                module.bias.zero_()
                module.weight.normal_()
            if isinstance(module, SparseBKCore):
                module.importance.bias.zero_()
            if isinstance(module, NgramMemory):
                module.count(tokens(model, 1, 30_000, seed=1)[0].numpy())
    return model


def tokens(model: LanguageModel, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def causal(model: LanguageModel) -> None:
    """Later tokens change no bit of earlier logits, for every prefix of 9 and of 65 tokens, and get no gradient."""
    for length in (9, 65):
        ids, other = tokens(model, 2, length), tokens(model, 2, length, seed=1)
        expected = model(ids).logits
        for n in range(1, length):
            changed = torch.cat([ids[:, :n], other[:, n:]], dim=1)
            differing = (model(changed).logits[:, :n] != expected[:, :n]).sum().item()
            assert differing == 0, f"{differing} logits of the first {n} of {length} tokens changed with later tokens"
    for n in (1, 2, 7, 32, 64):
        embedded = model.embed(ids).detach().requires_grad_()
        hook = model.embed.register_forward_hook(lambda m, i, out, leaf=embedded: leaf)
        model(ids).logits[:, :n].square().sum().backward()
        hook.remove()
        future = embedded.grad[:, n:]
        assert (future == 0).all(), f"gradient {future.abs().max():.2g} reaches tokens after {n}"
    model.zero_grad()


@torch.no_grad()
def batch_mates_and_padding(model: LanguageModel) -> None:
    """64 sequences have the same logits and the same last state alone and in a batch, however they are padded."""
    lengths = torch.randint(1, 40, (64,), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [tokens(model, 1, n, seed=i) for i, n in enumerate(lengths)]
    alone = [model(row).logits[0] for row in rows]
    width = max(lengths)
    for side in ("left", "right", "middle"):
        ids, mask = tokens(model, 64, width, seed=9), torch.zeros(64, width, dtype=torch.bool)
        for i, n in enumerate(lengths):
            half = n // 2
            places = {
                "left": list(range(width - n, width)),
                "right": list(range(n)),
                "middle": [*range(half), *range(width - n + half, width)],
            }[side]
            mask[i, places] = True
            ids[i, places] = rows[i][0]
        output = model(ids, mask=mask)
        for i in range(64):
            close(output.logits[i, mask[i]], alone[i], f"row {i}, padded {side}")
        following = tokens(model, 64, 3, seed=10)
        after = model(following, state=output.state).logits
        for i in range(0, 64, 7):
            close(
                after[i],
                model(torch.cat([rows[i], following[i : i + 1]], 1)).logits[0, -3:],
                f"state of row {i}, {side}",
            )


@torch.no_grad()
def padding_across_pieces(model: LanguageModel) -> None:
    """A text in pieces, some with padding and some only padding, gives the logits of the whole text."""
    ids = tokens(model, 3, 40)
    expected = model(ids).logits
    done, state, got = [0, 0, 0], None, [[], [], []]
    for counts in ((5, 0, 3), (0, 0, 1), (9, 4, 0), (1, 1, 1), (6, 0, 12), (19, 35, 23)):
        width = max(counts) + 2
        piece, mask = tokens(model, 3, width, seed=7), torch.zeros(3, width, dtype=torch.bool)
        for row, n in enumerate(counts):
            piece[row, 2 : 2 + n] = ids[row, done[row] : done[row] + n]
            mask[row, 2 : 2 + n] = True
        output = model(piece, mask=mask, state=state)
        state = output.state
        for row, n in enumerate(counts):
            got[row].append(output.logits[row, mask[row]])
            done[row] += n
    for row in range(3):
        close(torch.cat(got[row]), expected[row, : done[row]], f"row {row}")


@torch.no_grad()
def step_equals_forward(model: LanguageModel, length: int = 512) -> None:
    """Token by token, and cut anywhere, a text gives the logits of the parallel pass. The state does not grow."""
    ids = tokens(model, 2, length)
    expected = model(ids).logits
    state, logits, sizes = None, [], set()
    for t in range(length):
        output = model(ids[:, t : t + 1], state=state)
        state = output.state
        logits.append(output.logits)
        sizes.add(sum(x.numel() for x in torch.utils._pytree.tree_leaves(state)))
    close(torch.cat(logits, dim=1), expected, "steps")
    assert len(sizes) == 1, f"the state grows: {sorted(sizes)}"
    for cut in (1, 2, 3, 37, length - 1):
        first = model(ids[:, :cut])
        second = model(ids[:, cut:], state=first.state)
        close(torch.cat([first.logits, second.logits], dim=1), expected, f"cut at {cut}")


def any_length(model: LanguageModel) -> None:
    """Every N from 1 to 37 runs, has finite loss and gradients, and gives the first N logits of the longest."""
    ids = tokens(model, 1, 37)
    with torch.no_grad():
        whole = model(ids).logits
    for n in range(1, 38):
        output = model(ids[:, :n], targets=ids[:, :n])
        close(output.logits, whole[:, :n], f"N = {n}")
        assert torch.isfinite(output.loss), f"loss {output.loss} at N = {n}"
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"{name} at N = {n}"
        model.zero_grad()


def padding_is_not_counted(model: LanguageModel) -> None:
    """In training and in evaluation, targets at padding change no bit of the losses or of a gradient."""
    ids, targets = tokens(model, 3, 24), tokens(model, 3, 24, seed=4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :7], mask[1, -5:], mask[2, 8:11] = False, False, False
    for training in (True, False):
        results = []
        for padded in (-100, 7):
            torch.manual_seed(0)
            output = model.train(training)(ids, targets=targets.where(mask, torch.tensor(padded)), mask=mask)
            model.zero_grad()
            output.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([output.loss, *output.losses.values(), *gradients])
        assert all(map(torch.equal, *results)), f"targets at padding count, training: {training}"
    model.zero_grad()


def everything_learns(model: LanguageModel) -> None:
    """In training every parameter gets a gradient from the cross-entropy, the parameters of decisions included."""
    ids = tokens(model, 8, 33)
    output = model.train()(ids[:, :-1], targets=ids[:, 1:])
    output.losses["cross_entropy"].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("load_bias"):
            continue  # trained by the load, not by the task
        assert parameter.grad is not None, f"{name} gets no gradient from the task"
        assert parameter.grad.abs().max() > 0, f"{name} gets a zero gradient from the task"
    model.zero_grad()


@torch.no_grad()
def what_is_left_out_is_not_computed(model: LanguageModel) -> None:
    """The FLOPs executed in sparse cores and in experts are those that the records report."""
    with FlopCounterMode(display=False) as counter:
        records = model(tokens(model, 2, 64)).records
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    sparse = [r for r in records if isinstance(r, SparsityRecord)]
    heads, width = model.config.heads, model.config.d_model // model.config.heads
    kernel = hasattr(backend_for(torch.zeros(1)), "sparse_scan_forward")
    if sparse and kernel and model.config.readout == "propagator":
        kept = sum(int(r.kept.sum()) for r in sparse)
        sites = sum(int(r.sites) for r in sparse)
        assert 0.2 < kept / sites < 0.8
        each = 7 if model.config.energy_kind == "bonds" else 5  # operations for an entry of the state
        assert flops["resnet_bk.sparse_scan"] == heads * (each * width**2 * kept + 3 * width * (sites - kept))
        assert not {"resnet_bk.scan", "resnet_bk.delta_scan"} & flops.keys()
        if len(sparse) == len(records):  # all matrices belong to mixers, feed-forwards and the head
            assert flops["aten.mm"] == _dense_flops(model) + _kept_flops(model, sparse)
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    reports = [r for r in records if isinstance(r, ExpertsRecord)]
    for report in reports:
        assert report.load.sum() == report.used.sum()
        assert report.tokens == 128
    if experts:
        each = 6 * model.config.d_model * model.config.d_hidden
        router = sum(2 * 128 * r.weight.numel() for r in (m.router for m in experts))
        dense = _dense_flops(model) + _kept_flops(model, sparse) + router
        ran = flops["aten.mm"] - dense
        load = [int(n) for r in reports for n in r.load]
        assert ran == each * sum(-(-n // TILE) * TILE for n in load), "experts computed other rows than they report"


def _dense_flops(model: LanguageModel) -> int:
    """Return the FLOPs of the matrices that each of the 2 x 64 tokens is multiplied with."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    routers = [m.router for m in model.modules() if isinstance(m, Experts)]
    biased = [m for m in layers if m.bias is not None]  # these are counted as addmm
    kept = [m.qk_proj for m in model.modules() if isinstance(m, PropagatorMixer)]
    return sum(2 * 128 * m.weight.numel() for m in layers if m not in routers and m not in biased and m not in kept)


def _kept_flops(model: LanguageModel, records: list[SparsityRecord]) -> int:
    """Return the FLOPs of queries and keys: kept sites only, at the length of the fullest row in whole tiles."""
    mixers = [m for m in model.modules() if isinstance(m, PropagatorMixer)]
    rows = [len(r.kept) * -(-int(r.kept.sum(1).max()) // TILE) * TILE for r in records]
    return sum(2 * n * m.qk_proj.weight.numel() for n, m in zip(rows, mixers, strict=True)) if records else 0


def close(x: Tensor, y: Tensor, what: str) -> None:
    worst = (x - y).abs().max().item()
    assert worst <= 1e-12 * max(1.0, y.abs().max().item()), f"{what}: differs by {worst:.2g}"
