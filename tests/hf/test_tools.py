"""The model as the tools around transformers call it: Trainer, base models, embeddings, hidden states, the hub."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DynamicCache,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    pipeline,
)

from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer
from resnet_bk.hf.outputs import CACHE
from resnet_bk.layers.block import Block
from resnet_bk.training import trainer as own


def make(**fields):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig(**{"d_model": 16, "n_layers": 2, **fields})).eval()


def text(rows=2, length=20, seed=0):
    return torch.randint(97, 123, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows(count=8, length=12):
    return [{"input_ids": x, "labels": x} for x in text(count, length)]


def arguments(folder, **settings):
    defaults = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**defaults, "dataloader_pin_memory": False, **settings})


# ----------------------------------------------------------------------------------------------- Trainer


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_scores_stops_early_and_loads_the_best(tmp_path):
    shapes = []

    def accuracy(predicted):
        shapes.append((predicted.predictions.shape, predicted.label_ids.shape))
        return {"accuracy": float((predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]).mean())}

    settings = {"max_steps": 8, "learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = Trainer(
        make(num_experts=3),
        arguments(tmp_path, **settings),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.best_metric == min(losses)
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert 0 <= scores["eval_accuracy"] <= 1
    assert set(shapes) == {((8, 12, 259), (8, 12))}


def test_trainer_scores_batches_that_have_shifted_labels_only(tmp_path):
    data = [{"input_ids": x, "shift_labels": x.roll(-1)} for x in text(8)]
    settings = {"label_names": ["shift_labels"], "remove_unused_columns": False}
    trainer = Trainer(make(), arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] > 0


def test_trainer_smooths_labels_that_it_shifts(tmp_path):
    model, batch = make(), {"input_ids": text(), "labels": text()}
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows())
    log_p = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    nats = -log_p.gather(-1, batch["labels"][:, 1:, None]).mean()
    expected = 0.9 * nats - 0.1 * log_p.mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_predicts_texts_of_several_lengths(tmp_path):
    tokenizer = byte_tokenizer()
    data = [{"input_ids": tokenizer("x" * n)["input_ids"]} for n in (3, 9, 14, 1)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(make(num_experts=3), arguments(tmp_path), train_dataset=data, data_collator=collator)
    trainer.train()
    found = trainer.predict(data)
    assert found.predictions.shape == (4, 14, 259)
    assert found.metrics["test_loss"] > 0


def test_labels_are_the_one_argument_that_counts_as_labels():
    names = inspect.signature(ResNetBKForCausalLM.forward).parameters
    assert [name for name in names if "label" in name] == ["labels"]


# --------------------------------------------------------------------------------------- outputs in training


@pytest.mark.parametrize("training", [True, False])
def test_an_output_is_loss_logits_and_more(training):
    model, ids = make(num_experts=3).train(training), text()
    output = model(ids, labels=ids, use_cache=False)
    assert output.logits.shape == (2, 20, 259)
    assert list(output) == ["loss", "logits", "aux_loss"]
    as_tuple = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert as_tuple[0].dim() == 0
    assert as_tuple[1].shape == (2, 20, 259)
    skipped = model(ids, labels=ids, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, output.loss)


def test_the_gradient_of_logits_in_training_reaches_the_model():
    model, ids = make().train(), text()
    model(ids, labels=ids).logits.square().mean().backward()
    assert model.model.embed.weight.grad.abs().sum() > 0


def test_our_own_training_never_computes_logits(monkeypatch):
    model, ids = make().train(), text()
    monkeypatch.setattr(model.model.head, "forward", lambda *_: pytest.fail("logits were computed"))
    trainer = own.BKTrainer.__new__(own.BKTrainer)
    trainer.network, trainer.cross_entropy, trainer.losses, trainer.teacher = model, [], [], None
    monkeypatch.setattr(own.BKTrainer, "progress", 0.5)
    trainer.compute_loss(model, {"input_ids": ids, "shift_labels": ids}).backward()


# ---------------------------------------------------------------------------------------------- base model


@pytest.mark.parametrize("technique", [{}, {"n_layers": 4, "depth": {"policy": "exit"}}, {"memory": {"orders": [2]}}])
@torch.no_grad()
def test_the_base_model_returns_the_input_of_the_head(technique):
    model, ids = make(**technique), text()
    base = getattr(model, model.base_model_prefix)
    assert base is model.base_model is model.get_decoder()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = base(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(model.get_output_embeddings()(whole)[mask.bool()], logits[mask.bool()])
    first = base(input_ids=ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    cache = first["cache" if "cache" in first else "past_key_values"]
    for name in ("cache", "past_key_values"):
        second = base(input_ids=ids[:, 9:], attention_mask=mask, **{name: cache})
        torch.testing.assert_close(second.last_hidden_state, whole[:, 9:], rtol=1e-4, atol=1e-4)
    assert isinstance(base(input_ids=ids, return_dict=False), tuple)
    assert base(ids).logits.shape == (2, 20, 259), "with ids alone it is a LanguageModel"


# -------------------------------------------------------------------------------- embeddings, hidden states


@torch.no_grad()
def test_embeddings_of_tokens_are_as_good_as_the_tokens():
    model, ids, mask = make(), text(), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    embeds = model.get_input_embeddings()(ids)
    for given in ({}, {"attention_mask": mask}):
        expected, got = model(ids, labels=ids, **given), model(inputs_embeds=embeds, labels=ids, **given)
        torch.testing.assert_close(got.logits, expected.logits)
        torch.testing.assert_close(got.loss, expected.loss)
        settings = {**given, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(inputs_embeds=embeds, **settings), model.generate(ids, **settings)[:, 20:])


def test_the_gradient_reaches_embeddings_that_are_given():
    """As learned prompts need it."""
    model, ids = make(), text()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    assert (embeds.grad[:, :-1].norm(dim=-1) > 0).all()


@torch.no_grad()
def test_beams_and_caches_continue_from_embeddings():
    model, ids = make(), text()
    embeds = model.get_input_embeddings()(ids)
    settings = {"max_new_tokens": 4, "do_sample": False}
    beams = model.generate(inputs_embeds=embeds, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, **settings)[:, 20:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **settings), model.generate(ids, **settings))
    mixed = torch.cat([torch.randn(2, 3, 16), embeds], dim=1)
    later = model(ids[:, 4:], **{CACHE: model(inputs_embeds=mixed[:, :7])[CACHE]}).logits
    torch.testing.assert_close(later, model(inputs_embeds=mixed).logits[:, 7:], rtol=1e-4, atol=1e-4)


def test_embeddings_are_refused_in_one_line_where_they_do_not_fit():
    embeds = torch.zeros(2, 5, 16)
    words = {"factors": [2], "layers": [1, 1, 0], "boundaries": "whitespace"}
    for technique, name in (
        ({"memory": {"orders": [2]}}, "memory"),
        ({"multiscale": words}, r"multiscale\.boundaries"),
        ({"length": {"bins": 4, "mode": "pool", "spacing": "words"}}, r"length\.spacing"),
    ):
        with pytest.raises(ValueError, match=rf"inputs_embeds: model\.{name} reads token ids"):
            make(**technique)(inputs_embeds=embeds)
    for given, error, words in (
        ({"inputs_embeds": embeds[..., :8]}, ValueError, r"expected shape \(B, N, 16\)"),
        ({"inputs_embeds": embeds.long()}, TypeError, "expected floating-point embeddings, got torch.int64"),
        ({"inputs_embeds": embeds, "input_ids": text()}, ValueError, "got both, expected one"),
    ):
        with pytest.raises(error, match=words):
            make()(**given)


@torch.no_grad()
def test_hidden_states_are_given():
    model, ids = make(n_layers=3), text()
    output = model(ids, output_hidden_states=True)
    assert [x.shape for x in output.hidden_states] == [(2, 20, 16)] * 4
    torch.testing.assert_close(output.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.model.head(output.hidden_states[-1]), output.logits)
    base = model.base_model(input_ids=ids, output_hidden_states=True)
    assert all(map(torch.equal, base.hidden_states, output.hidden_states))
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4
    generated = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True)
    assert [step[-1].shape[1] for step in generated.hidden_states] == [20, 1, 1]


@torch.no_grad()
def test_hidden_states_of_a_padded_row_are_those_of_the_row_alone():
    model, ids = make(n_layers=4, multiscale={"factors": [2]}), text()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[:1, 6:], output_hidden_states=True).hidden_states
    assert len(padded) == 1 + len(model.model.blocks)
    for one, other in zip(padded, alone, strict=True):
        torch.testing.assert_close(one[:1, 6:], other, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hidden_states_in_training_have_a_gradient_and_follow_the_logits():
    model, ids = make().train(), text()
    model.gradient_checkpointing_enable()
    loss, logits, hidden = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert loss.dim() == 0
    assert logits.shape == (2, 20, 259)
    hidden[1].square().sum().backward()
    assert model.model.embed.weight.grad.abs().sum() > 0


def test_attentions_are_refused_in_one_line():
    model, ids = make(), text()
    settings = {"max_new_tokens": 2, "return_dict_in_generate": True}
    for call in (
        model,
        lambda ids, **given: model.base_model(input_ids=ids, **given),
        lambda ids, **given: model.generate(ids, **settings, **given),
    ):
        with pytest.raises(ValueError, match="output_attentions: got True, allowed False"):
            call(ids, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: got True, allowed False"):
        model(ids)


# ------------------------------------------------------------------------------------------------ keywords


@torch.no_grad()
def test_a_cache_is_read_under_either_name():
    model, ids = make(), text()
    first, whole = model(ids[:, :9]), model(ids).logits
    cache = first["cache" if "cache" in first else "past_key_values"]
    for name in ("cache", "past_key_values"):
        torch.testing.assert_close(model(ids[:, 9:], **{name: cache}).logits, whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_caches_that_would_be_ignored_are_errors():
    model, ids = make(), text()
    one, other = model(ids[:, :5])[CACHE], model(ids[:, :9])[CACHE]
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match="cache, past_key_values: got both, expected one of them"):
            call(input_ids=ids, cache=one, past_key_values=other)
        call(input_ids=ids, cache=one, past_key_values=one)
        with pytest.raises(TypeError, match="expected a RecurrentCache, got DynamicCache"):
            call(input_ids=ids, past_key_values=DynamicCache())


def test_misspelt_keywords_of_generate_are_errors():
    for name in ("past_key_value", "attention_masks", "input_embed"):
        with pytest.raises(ValueError, match=name):
            make().generate(text(), max_new_tokens=2, **{name: text()})


def test_unknown_keywords_are_errors():
    model, ids = make(), text()
    for name, near in (
        ("past_key_value", "past_key_values"),
        ("attention_masks", "attention_mask"),
        ("label", "labels"),
        ("shift_label", "shift_labels"),
    ):
        with pytest.raises(TypeError, match=f"unknown keyword {name!r}; did you mean {near!r}"):
            model(ids, **{name: ids})
    with pytest.raises(TypeError, match="unknown keyword 'input_id'"):
        model.base_model(input_id=ids)
    with pytest.raises(ValueError, match="position_ids: got a restart within a row"):
        model(ids, position_ids=torch.arange(20).expand(2, -1) % 7)
    with pytest.raises(ValueError, match="cu_seq_lens_q: several sequences in a row, expected one"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 7, 20]), max_length_q=13)
    expected = model(ids).logits
    for harmless in ({"position_ids": torch.arange(20).expand(2, -1)}, {"token_type_ids": 0 * ids}, {"any": None}):
        assert torch.equal(model(ids, **harmless).logits, expected)


# ------------------------------------------------------------------------------------------- recomputation


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_blocks_recompute_where_transformers_asks_for_it(tmp_path):
    model, ids = make().train(), text()
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert model.is_gradient_checkpointing
    assert all(block.recomputes for block in blocks)
    torch.testing.assert_close(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())), plain)
    model.gradient_checkpointing_disable()
    assert not any(block.recomputes for block in blocks)
    Trainer(model, arguments(tmp_path, gradient_checkpointing=True), train_dataset=rows()).train()
    assert all(block.recomputes for block in blocks)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "technique", [{"num_experts": 3}, {"n_layers": 4, "depth": {"policy": "act"}}, {"sparsity": {"target": 0.5}}]
)
def test_recomputed_techniques_have_the_same_gradients(technique):
    model, ids = make(**technique).train(), text()
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    torch.testing.assert_close(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())), plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_frozen_blocks_recompute_for_the_few_weights_that_train():
    """As adapters need it."""
    model, ids = make().train(), text()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for name, p in model.named_parameters():
        p.requires_grad_("out_proj" in name)
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        f"model.blocks.{i}.mixer.out_proj.weight" for i in range(2)
    ]


# ------------------------------------------------------------------------------------------------- the hub

PROGRAM = """
import os, sys
{first}
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(folder + "/copy")
model = AutoModelForCausalLM.from_pretrained(folder + "/copy", trust_remote_code=True)
print(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__, type(model).__module__)
"""


def without_import(folder, first=""):
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM.format(first=first), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_a_folder_loads_in_a_program_that_does_not_import_the_package(tmp_path):
    make().save_pretrained(tmp_path)
    done = without_import(tmp_path)
    assert done.stdout.split() == ["ResNetBKConfig", "resnet_bk.hf.modeling"], done.stderr
    done = without_import(tmp_path, "sys.modules['resnet_bk'] = None")
    assert "pip install 'resnet-bk[hf]'" in done.stderr.splitlines()[-1]


def test_a_folder_loads_without_running_its_code_where_the_package_is_imported(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "modeling_resnet_bk.py").write_text("raise SystemExit('this must not run')")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ResNetBKForCausalLM


def test_names_of_a_repository_do_not_stay_in_a_copy():
    given = {"AutoConfig": "someone/repository--modeling_resnet_bk.ResNetBKConfig"}
    assert "--" not in str(ResNetBKConfig(auto_map=given).to_dict()["auto_map"])


def test_the_pipeline_continues_a_text(caplog):
    generator = pipeline("text-generation", model=make(), tokenizer=byte_tokenizer())
    found = generator("def ", max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    assert isinstance(found, str)
    assert "not supported" not in caplog.text
    assert np.isfinite(len(found))
