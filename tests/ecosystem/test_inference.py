"""Examples: other people's evaluation and text generation with a tiny model, offline."""

import json
import math
import threading

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from resnet_bk.data.tokens import encode
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of packages that this project does not control
]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=2)).eval()


def test_the_harness_scores_bits_per_byte_of_local_text(model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from resnet_bk.study import harness  # registers the model

    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = ["def add(a, b):\n    return a + b\n" * n for n in (1, 200)]  # the second is longer than 2,048 tokens
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    (tmp_path / "task.yaml").write_text(TASK.format(path=tmp_path / "texts.jsonl"))
    found = simple_evaluate(
        model="resnet-bk",
        model_args={"pretrained": str(tmp_path / "model")},
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    nats = 0.0
    for text in texts:
        ids = torch.cat([torch.tensor([1]), encode(text)]).unsqueeze(0)
        nats += float(model.model(ids[:, :-1], targets=ids[:, 1:]).loss) * len(text)
    bits = nats / math.log(2) / sum(map(len, texts))
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert harness.HarnessModel(str(tmp_path / "model")).max_length == 65_536


def test_a_pipeline_continues_several_texts(model):
    generator = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    found = generator(["def ", "import os\n"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert [len(texts) for texts in found] == [1, 1]
    assert found[1][0]["generated_text"].startswith("import os\n")


def test_a_streamer_yields_the_text_as_it_is_made(model):
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    batch = tokenizer(["def "], return_tensors="pt")
    expected = model.generate(**batch, max_new_tokens=20, do_sample=False)
    thread = threading.Thread(
        target=model.generate, kwargs={**batch, "max_new_tokens": 20, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(expected[0, 4:])
