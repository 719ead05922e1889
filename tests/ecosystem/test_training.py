"""Examples: other people's trainers on a tiny model, offline. Each trains a step or two and changes the weights."""

import json

import pytest
import torch

from resnet_bk.cli import main
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of packages that this project does not control
]
ANSWERS = [{"prompt": f"What is {a} + 1?\n", "completion": f"{a + 1}"} for a in range(8)]


def make(**fields):
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig(**{"d_model": 16, "n_layers": 2, **fields}))


def settings(folder, **others):
    shared = {"output_dir": str(folder), "max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    batches = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False}
    return {**shared, **batches, "disable_tqdm": True, **others}


def trains(trainer):
    """Train; return whether a weight changed and every logged loss is finite."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))
    return any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_sft_on_prompts_and_answers_in_a_file(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    arguments = trl.SFTConfig(**settings(tmp_path, max_steps=2, max_length=64))
    trainer = trl.SFTTrainer(make(), arguments, train_dataset=data, processing_class=byte_tokenizer())
    assert trains(trainer)


def test_sft_of_packed_rows_is_refused_in_one_line(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments, data = (
        trl.SFTConfig(**settings(tmp_path, packing=True, max_length=64)),
        datasets.Dataset.from_list(ANSWERS),
    )
    trainer = trl.SFTTrainer(make(), arguments, train_dataset=data, processing_class=byte_tokenizer())
    with pytest.raises(ValueError, match="several sequences in a row, expected one; switch off packing"):
        trainer.train()


def test_sft_scores_held_out_rows_and_recomputes(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(**settings(tmp_path, max_length=64, gradient_checkpointing=True))
    data = {"train_dataset": datasets.Dataset.from_list(ANSWERS), "eval_dataset": datasets.Dataset.from_list(ANSWERS)}
    trainer = trl.SFTTrainer(make(num_experts=3), arguments, **data, processing_class=byte_tokenizer())
    assert trains(trainer)
    assert trainer.evaluate()["eval_loss"] > 0


def test_kto(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**x, "label": i % 2 == 0} for i, x in enumerate(ANSWERS)])
    arguments = trl.KTOConfig(**settings(tmp_path, max_length=64))
    models = {"model": make(), "ref_model": make()}
    assert trains(trl.KTOTrainer(**models, args=arguments, train_dataset=rows, processing_class=byte_tokenizer()))


def test_dpo(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "?"} for x in ANSWERS]
    make().save_pretrained(tmp_path / "model")  # from where the trainer also loads the model to compare with
    trainer = trl.DPOTrainer(
        str(tmp_path / "model"),
        args=trl.DPOConfig(**settings(tmp_path, max_length=64)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=byte_tokenizer(),
    )
    assert trains(trainer)


def test_grpo(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def letters(completions, **others):
        return [float(sum(x.isalpha() for x in completion)) for completion in completions]

    trainer = trl.GRPOTrainer(
        make(),
        letters,
        args=trl.GRPOConfig(**settings(tmp_path, num_generations=4, max_completion_length=8)),
        train_dataset=datasets.Dataset.from_list([{"prompt": x["prompt"]} for x in ANSWERS]),
        processing_class=byte_tokenizer(),
    )
    assert trains(trainer)


@pytest.mark.parametrize("experts", [1, 3])
def test_low_rank_adapters_train_and_merge(experts, tmp_path):
    peft, trl, datasets = (pytest.importorskip(name) for name in ("peft", "trl", "datasets"))
    model = make(num_experts=experts)
    ids = torch.randint(97, 123, (2, 20))
    expert_weights = [name for name, p in model.named_parameters() if p.dim() == 3]
    adapters = peft.LoraConfig(
        r=4, target_modules=["in_proj", "out_proj"], target_parameters=expert_weights, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, adapters)
    arguments = trl.SFTConfig(**settings(tmp_path, max_length=64))
    data = datasets.Dataset.from_list(ANSWERS)
    trainer = trl.SFTTrainer(adapted, arguments, train_dataset=data, processing_class=byte_tokenizer())
    assert trains(trainer)
    expected = adapted.eval()(ids).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is ResNetBKForCausalLM
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_learned_prompt_trains_and_generates():
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=1)
    model, ids = peft.get_peft_model(make(), prompt), torch.randint(97, 123, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert [p.shape for p in model.parameters() if p.grad is not None] == [(4, 16)]
    assert model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_our_own_training_reads_what_datasets_streams(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i}: def f(x): ...\n"}) + "\n" for i in range(99))
    )
    stream = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    (tmp_path / "corpus").mkdir()
    for i, row in enumerate(stream.shuffle(seed=0)):
        (tmp_path / "corpus" / f"{i:03}.txt").write_text(row["text"])
    model = ("--model.d_model=16", "--model.n_layers=1", "--model.n_seq=32")
    rest = (f"--data.source={tmp_path / 'corpus'}", f"--output_dir={tmp_path / 'run'}", "--batch_size=4")
    assert main(["train", *model, *rest, "--max_steps=2"]) == 0
