"""The model under transformers: saving, loading, generation, losses."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from resnet_bk.checkpoint import MANIFEST, CheckpointError, seal
from resnet_bk.config import ConfigError
from resnet_bk.hf import RecurrentCache, ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer
from resnet_bk.hf.modeling import CACHE
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.score import Score
from resnet_bk.layers.sparse import SparseBKCore

SCALES = {"factors": [2], "layers": [1, 1, 1], "ratio_weight": 0.0}  # of whole batches, not rows
LENGTH = {"bins": 4, "max_length": 8, "penalty": 0.0, "entropy_weight": 0.0}  # of whole batches, not rows
TECHNIQUES = [
    pytest.param({"readout": readout, "energy": energy, "num_experts": experts}, id=f"{readout}-{energy}-{experts}")
    for readout, energy, experts in [
        ("propagator", "real", 1),
        ("propagator", "complex", 1),
        ("diagonal", "real", 1),
        ("diagonal", "complex", 1),
        ("propagator", "real", 3),
    ]
] + [
    pytest.param({"n_layers": None, "multiscale": {**SCALES, "boundaries": rule}}, id=rule)
    for rule in ("fixed", "learned")
]
TECHNIQUES += [
    pytest.param({"length": {**LENGTH, **settings}}, id="length-" + "-".join(settings.values()))
    for settings in ({"mode": "truncate"}, {"mode": "pool"}, {"placement": "geometric", "pooling": "attention"})
]
TECHNIQUES += [
    pytest.param({"n_layers": 4, "depth": {**depth, "penalty": 0.0}}, id="depth-" + depth["policy"])
    for depth in ({"policy": "act"}, {"policy": "skip"}, {"policy": "exit", "threshold": 0.9, "confidence": "gain"})
]
TECHNIQUES += [
    pytest.param({"sparsity": {"target": 0.5, "penalty": 0.0}}, id="sparse"),
    pytest.param(
        {"num_experts": 3, "experts": {"policy": "top_p", "zero": 1, "identity": 1, "cost_weight": 0.0}},
        id="experts-null",
    ),
]
TECHNIQUES += [
    pytest.param({"attention": {"every": 2, "window": 5}}, id="attention"),
    pytest.param({"attention": {"every": 1, "window": 40}}, id="attention-wide"),
    pytest.param({"memory": {"orders": [1, 3, 6], "rows": 5000}}, id="memory"),
    pytest.param({"memory": {"recent": [1, 3, 6], "recent_rows": 50}}, id="recent"),
]
V = 31


def tiny(dtype=torch.float64, **fields):
    """Return an untrained model that depends on the past: untied, else it repeats the last token; amplified mixers."""
    defaults = {"vocab_size": V, "d_model": 16, "n_layers": 2, "num_experts": 1, "tie_word_embeddings": False}
    config = ResNetBKConfig(**{**defaults, "eos_token_id": None, **fields})
    model = ResNetBKForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mixer):
                module.out_proj.weight *= 8
            if isinstance(module, Score):  # decisions of both kinds
                module.bias.zero_()
                module.weight.normal_()
            if isinstance(module, SparseBKCore):
                module.importance.bias.zero_()
            if isinstance(module, NgramMemory):
                module.count(ids(1, 20_000)[0].numpy())
                module.vectors.gain *= 8
    return model.to(dtype).eval()


def ids(rows, length, seed=0):
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def argmax_loop(model, prompt, new):
    for _ in range(new):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("first", ["resnet_bk", "transformers"])
def test_auto_classes_know_the_model_in_either_import_order(first, tmp_path):
    from resnet_bk.hf import byte_tokenizer

    tiny(torch.float32, vocab_size=259).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    imports = ["import resnet_bk", "from transformers import AutoConfig"]
    program = "\n".join(
        [
            *(imports if first == "resnet_bk" else reversed(imports)),
            "import sys",
            "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)",
            "print(len(AutoTokenizer.from_pretrained(sys.argv[1])))",
        ]
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["ResNetBKConfig", "ResNetBKForCausalLM", "259"], done.stderr


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_keeps_every_bit_and_the_tying(technique, tied, tmp_path):
    model = tiny(torch.float32, tie_word_embeddings=tied, **technique)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_resnet_bk.py",
        MANIFEST,
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.model.head.weight is loaded.model.embed.weight) is tied
    assert loaded.num_parameters() == model.num_parameters()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.config.model_config() == model.config.model_config()
    assert torch.equal(loaded.eval()(ids(2, 20)).logits, model(ids(2, 20)).logits)


def test_a_flipped_bit_in_the_weights_is_an_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-7] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected SHA-256 .* got"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [("missing", "missing 'model.norm.weight'"), ("extra", "unexpected 'model.norm.bias'")]
)
def test_weights_of_another_model_are_an_error(change, message, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.bias"] = torch.zeros(16)
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.fill_(torch.nan), "has a NaN or an infinity"),
        (lambda x: x.to(torch.int8), "got I8"),
        (lambda x: x.to(torch.complex64), "got C64"),
        (lambda x: x.T, r"expected shape \(65, 16\), got \(16, 65\)"),
    ],
)
def test_weights_that_no_model_can_have_are_an_error(change, message, tmp_path):
    from safetensors.torch import load_file, save_file

    name, path = "model.blocks.0.mixer.in_proj.weight", tmp_path / "model.safetensors"
    tiny(torch.float32).save_pretrained(tmp_path)
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata={"format": "pt"})
    seal(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: {name!r}: ")


def test_nothing_is_unpickled(tmp_path):
    model = tiny(torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_weights_in_several_files_load(tmp_path):
    model = tiny(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_a_folder_saved_again_with_its_tokenizer_still_loads(tmp_path):
    model, arguments = tiny(vocab_size=300), TrainingArguments(str(tmp_path / "trainer"), report_to=[])
    trainer = Trainer(model, arguments, processing_class=byte_tokenizer())
    for _ in range(2):
        trainer.save_model(str(tmp_path / "model"))
        ResNetBKForCausalLM.from_pretrained(tmp_path / "model")
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert ResNetBKForCausalLM.from_pretrained(tmp_path / "model").generation_config.max_new_tokens == 7


def test_a_snapshot_of_the_hub_cache_loads_and_is_checked(tmp_path):
    model = tiny()
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/0123", "blobs"))
    model.save_pretrained(tmp_path / "saved")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (tmp_path / "saved").iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    ResNetBKForCausalLM.from_pretrained(snapshot)
    with (blobs / "model.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(CheckpointError, match=r"expected .* bytes, got"):
        ResNetBKForCausalLM.from_pretrained(snapshot)


def test_any_error_while_a_folder_loads_names_it_in_one_line(tmp_path):
    tiny(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded as a ResNet-BK model") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="other")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_an_error_with_the_nearest_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["n_layer"] = 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="unknown field 'n_layer'; did you mean 'n_layers'"):
        ResNetBKConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{"num_experts_per_tok": 5}, {"readout": "sideways"}, {"d_model": 0}])
def test_settings_that_no_model_can_have_are_an_error(fields):
    with pytest.raises((ConfigError, TypeError, ValueError), match=r"top_k|readout|d_model"):
        ResNetBKConfig(**fields)


def test_configurations_are_equal_where_their_fields_are():
    assert ResNetBKConfig(d_model=32) == ResNetBKConfig(d_model=32)
    assert ResNetBKConfig(d_model=32) != ResNetBKConfig(d_model=64)


def test_experts_per_token_are_not_taken_for_a_sampling_setting():
    model = tiny(num_experts=3, num_experts_per_tok=2)
    assert model.generation_config.top_k is None
    assert model.model.config.top_k == 2
    assert ResNetBKConfig.from_model_config(model.model.config).model_config() == model.model.config


@pytest.mark.parametrize("memory", [{}, {"orders": [1, 2], "rows": 2000, "recent": [1]}])
def test_the_vocabulary_can_grow(memory):
    model = tiny(memory=memory)
    before = model(ids(1, 8)).logits
    model.resize_token_embeddings(V + 4)
    after = model(torch.cat([ids(1, 8), torch.tensor([[V + 3]])], dim=1)).logits
    assert after.shape == (1, 9, V + 4)
    torch.testing.assert_close(after[:, :8, :V], before)


def test_a_smaller_vocabulary_leaves_the_table(tmp_path):
    model = tiny(torch.float32, memory={"orders": [1, 2], "rows": 2000})
    model.resize_token_embeddings(20)
    model.model.memory.check_entries("here")
    assert torch.isfinite(model(ids(1, 30) % 20).logits).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids(1, 30) % 20).logits, model(ids(1, 30) % 20).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.fill_(V << 8 | 9), "has entries that no text with a vocabulary of 31 has"),
        (lambda x: x.fill_(-1), "has entries that no text with a vocabulary of 31 has"),
        (lambda x: x.fill_(16), "has entries that no text with a vocabulary of 31 has"),
        (lambda x: x.fill_(2**24), "has entries that no text with a vocabulary of 31 has"),
        (lambda x: x.float(), "expected I32, got F32; save it as 32-bit integers"),
        (lambda x: x[1:], r"expected shape \(50, 5\), got \(49, 5\)"),
    ],
)
def test_tables_that_no_model_can_have_are_an_error(change, message, tmp_path):
    from safetensors.torch import load_file, save_file

    name, path = "model.blocks.0.entries", tmp_path / "model.safetensors"
    tiny(torch.float32, memory={"orders": [1], "rows": 50}).save_pretrained(tmp_path)
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata={"format": "pt"})
    seal(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_saved_or_loaded_in_half_precision_computes_about_the_same(dtype, tmp_path):
    model = tiny(torch.float32)
    expected = model(ids(2, 20)).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model.to(dtype).save_pretrained(tmp_path)
    for half in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert half.model.head.weight.dtype == dtype
        assert (half(ids(2, 20)).logits.float() - expected).norm() < 0.05 * expected.norm()


# --------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_greedy_generation_is_the_argmax_of_full_forwards(technique):
    model, prompt = tiny(**technique), ids(2, 5)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), argmax_loop(model, prompt, 12))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_left_padded_prompts_continue_as_without_padding(technique):
    model, prompts = tiny(**technique), [ids(1, n, seed=n) for n in (1, 4, 9)]
    width = max(p.shape[1] for p in prompts)
    batch = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[width:], argmax_loop(model, prompt, 10)[0, prompt.shape[1] :])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_beam_search_with_the_cache_is_beam_search_without(technique, monkeypatch):
    model, prompt = tiny(**technique), ids(2, 5)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16, "do_sample": False}
    without = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, **settings), without)
    monkeypatch.setattr(RecurrentCache, "reorder_cache", lambda self, rows: None)
    assert not torch.equal(model.generate(prompt, **settings), without), "these beams are never reordered"


def test_sampling_repeats_with_its_seed_and_gives_several_sequences():
    model, prompt = tiny(), ids(2, 5)
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = model.generate(prompt, **settings)
    torch.manual_seed(1)
    assert torch.equal(first, model.generate(prompt, **settings))
    assert not torch.equal(first, model.generate(prompt, **settings))
    assert first.shape == (6, 15)
    assert torch.equal(first[:, :5], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in first}) > 3


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_cache_does_not_grow(technique):
    model = tiny(**technique)

    def size(new):
        output = model.generate(ids(1, 5), max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
        leaves = torch.utils._pytree.tree_leaves(output[CACHE].state)
        assert output[CACHE].get_seq_length() == 5 + new - 1
        return sum(leaf.numel() for leaf in leaves), sum(leaf.untyped_storage().nbytes() for leaf in leaves)

    assert size(10) == size(100)


def test_a_conversation_continues_from_the_cache_of_its_last_turn():
    model = tiny()
    first = model.generate(ids(1, 6), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids(1, 4, seed=3)], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False}
    continued = model.generate(longer, **{CACHE: first[CACHE]}, **settings)
    assert torch.equal(continued, model.generate(longer, **settings))


def test_assisted_decoding_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids(1, 5), assistant_model=model, max_new_tokens=3)


def test_logits_to_keep_are_the_last_or_the_named_positions():
    model, prompt = tiny(), ids(2, 9)
    everything = model(prompt).logits
    torch.testing.assert_close(model(prompt, logits_to_keep=1).logits, everything[:, -1:])
    torch.testing.assert_close(model(prompt, logits_to_keep=4).logits, everything[:, -4:])
    torch.testing.assert_close(model(prompt, logits_to_keep=torch.tensor([0, 7])).logits, everything[:, [0, 7]])


def test_arguments_that_do_not_fit_are_named():
    model, prompt = tiny(), ids(2, 9)
    output = model(prompt)
    other, mask = model(prompt[:1]), torch.ones_like(prompt)
    model(prompt, attention_mask=mask.repeat(1, 2), **{CACHE: output[CACHE]})
    refused = [
        ({"input_ids": None}, TypeError, "input_ids: expected int64 or int32 token ids, got NoneType"),
        ({"input_ids": prompt[0]}, ValueError, r"input_ids: expected shape \(B, N\)"),
        ({"attention_mask": mask[0]}, ValueError, r"attention_mask: expected shape \(2, 9\), got \(9,\)"),
        ({"attention_mask": mask[:, :8]}, ValueError, r"attention_mask: .* got \(2, 8\)"),
        ({"attention_mask": mask.repeat(1, 2)}, ValueError, r"attention_mask: .* got \(2, 18\)"),
        ({"attention_mask": [[1] * 9] * 2}, TypeError, "attention_mask: expected a tensor, got list"),
        ({"attention_mask": 2 * mask}, ValueError, "attention_mask: got 2, allowed 1 for tokens and 0"),
        ({"attention_mask": torch.full_like(mask, -1)}, ValueError, "attention_mask: got -1"),
        ({"labels": prompt[:, 1:]}, ValueError, "labels: expected the shape of ids"),
        ({"labels": prompt.int()}, TypeError, "labels: expected int64 token ids, got torch.int32"),
        ({"shift_labels": prompt + V}, ValueError, f"shift_labels: token id .* 0 to {V - 1}, and -100"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep: got -1, allowed 0 for all, or a number of last"),
        ({"logits_to_keep": 1.0}, ValueError, r"logits_to_keep: got 1\.0"),
        ({CACHE: output.logits}, TypeError, f"{CACHE}: expected a RecurrentCache, got Tensor"),
        ({CACHE: other[CACHE]}, ValueError, rf"{CACHE}\.state\[0\]\.conv: expected shape \(2,"),
    ]
    for keywords, error, words in refused:
        with pytest.raises(error, match=words):
            model(**{"input_ids": prompt, **keywords})


# ------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_loss_is_the_mean_over_counted_labels(technique):
    model, prompt = tiny(**technique), ids(3, 10)
    labels = prompt.masked_fill(torch.rand(3, 10) < 0.3, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    output = model(prompt, labels=labels)
    nats = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    extra = 0.0 if output.aux_loss is None else output.aux_loss
    assert (output.aux_loss is not None) == (
        technique.get("num_experts", 1) > 1
        or any(name in str(technique) for name in ("learned", "length", "'act'", "'skip'", "sparsity"))
    )
    torch.testing.assert_close(output.loss, nats + extra)
    torch.testing.assert_close(model(prompt, shift_labels=shifted).loss, output.loss)
    assert output.loss != model(prompt, labels=prompt).loss


def test_the_auxiliary_loss_is_the_weighted_balance_loss():
    model = tiny(num_experts=3, balance_weight=0.5)
    losses = model.model(ids(3, 10)).losses
    torch.testing.assert_close(model(ids(3, 10), labels=ids(3, 10)).aux_loss, 0.5 * losses["balance"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_padding_changes_neither_loss_nor_gradient(technique, side):
    model, rows = tiny(balance_weight=0.0, **technique), [ids(1, n, seed=n) for n in (2, 5, 9)]
    total = sum(row.shape[1] - 1 for row in rows)
    alone = [model(row, labels=row, num_items_in_batch=total).loss for row in rows]
    expected = gradients(model, sum(alone))

    def pad(row, value):
        missing = 9 - row.shape[1]
        return torch.nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    batch, labels = (torch.cat([pad(row, value) for row in rows]) for value in (0, -100))
    mask = torch.cat([pad(torch.ones_like(row), 0) for row in rows])
    loss = model(batch, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, sum(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_labels_at_padding_are_not_counted(technique):
    """Neither as targets of the token before, nor as targets of padding, nor in the share of the batch."""
    model, text = tiny(**technique), ids(3, 10)
    mask = torch.ones_like(text)
    mask[0, :3], mask[1, 7:], mask[2, 4:6] = 0, 0, 0
    clean, shifted = text.masked_fill(mask == 0, -100), text.roll(-1, 1).masked_fill(mask == 0, -100)
    for clean_labels, labels in (
        ({"labels": clean}, {"labels": text}),
        ({"shift_labels": shifted}, {"shift_labels": text.roll(-1, 1)}),
    ):
        for share in ({}, {"num_items_in_batch": 40}):
            expected = model(text, attention_mask=mask, **clean_labels, **share)
            got = model(text, attention_mask=mask, **labels, **share)
            assert torch.equal(got.loss, expected.loss)
            assert all(map(torch.equal, gradients(model, got.loss), gradients(model, expected.loss)))


def test_a_batch_without_labels_has_a_loss_of_zero():
    model, text = tiny().train(), ids(2, 6)
    for share in (None, 0, 5):
        loss = model(text, labels=torch.full_like(text, -100), num_items_in_batch=share).loss
        assert loss == 0
        assert all((x == 0).all() for x in gradients(model, loss))


@pytest.mark.parametrize("experts", [1, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(experts, tmp_path):
    """With one step of SGD at rate 1, the weights move by the gradient. With experts, all rows of the batch are equal,
    because the balance loss is not linear in the batch."""
    rows = ids(8, 12)
    labels = rows.clone()
    for i in range(8):
        labels[i, : 1 + i % 5] = -100
    if experts > 1:
        rows, labels = rows[:1].expand(8, -1), labels[:1].expand(8, -1)
    data = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]

    def step(batch, accumulate):
        torch.manual_seed(0)
        model = tiny(num_experts=experts, balance_weight=0.3)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
        moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        return trainer.state.log_history[0]["loss"], moved, model

    loss, whole, _ = step(8, 1)
    parts_loss, parts, model = step(2, 4)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    torch.manual_seed(0)
    model = tiny(num_experts=experts, balance_weight=0.3).train()
    torch.testing.assert_close(gradients(model, model(rows, labels=labels).loss), whole, rtol=1e-9, atol=1e-12)
