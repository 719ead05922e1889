"""The worked example of CONTRIBUTING.md, applied to a copy of the sources: a technique touches three places."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRIAL = """
import sys
import torch
import contract_checks as checks
from resnet_bk.cli import main
from resnet_bk.config import TECHNIQUES
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers.block import Tokens
from resnet_bk.study.ledger import Ledger

fields = {"halving": {"on": True, "penalty": 0.5}}
model = checks.build(**fields)
for contract in (checks.causal, checks.step_equals_forward, checks.batch_mates_and_padding, checks.everything_learns):
    contract(model)
ids = torch.randint(31, (2, 20))
output = model(ids, targets=ids)
expected = output.losses["cross_entropy"] + 0.5 * output.losses["size"]
torch.testing.assert_close(output.loss, expected)
plain = checks.build()
x = plain.embed(ids)
halved, _, _ = model.blocks(x, Tokens(ids), None, None)
torch.testing.assert_close(halved, plain.blocks(x, Tokens(ids), None, None)[0] / 2)
with Ledger(model) as ledger:
    model(ids)
with Ledger(plain) as other:
    plain(ids)
assert ledger.total == other.total and ledger.by_token.shape == (2, 20)
config = model.config
assert config.techniques == ["halving"] and config.without("halving").techniques == [] and "halving" in TECHNIQUES
network = ResNetBKForCausalLM(ResNetBKForCausalLM.config_class.from_model_config(config))
network.save_pretrained("model")
assert ResNetBKForCausalLM.from_pretrained("model").model.config == network.model.config
assert main(["train", "--model.halving.penalty=-1", "--max_steps=1"]) == 2
small = ["--model.d_model=16", "--model.n_layers=1", "--model.n_seq=16", "--batch_size=2", "--data.cache=cache"]
assert main(["train", "--model.halving.on=true", *small, f"--data.source={sys.argv[1]}", "--max_steps=2"]) == 0
"""


def edited(root: Path, block: str) -> list[str]:
    """Apply the edits of a diff without line numbers; returns the files' names. Each place must be there once."""
    names = []
    for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        path, names = root / name, [*names, name]
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            text = path.read_text()
            assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
            path.write_text(text.replace(old, new))
    return names


@pytest.fixture
def blocks():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^   ```(python|diff)\n(.*?)^   ```", text, flags=re.MULTILINE | re.DOTALL)
    return [(kind, textwrap.dedent(body)) for kind, body in found]


def test_a_toy_technique_touches_its_file_its_section_and_the_composition(blocks, tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    touched = []
    for kind, body in blocks:
        if kind == "python":
            name = body.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(body.partition("\n")[2])
            touched.append(name)
        else:
            touched += edited(tmp_path, body)
    config = "src/resnet_bk/config"
    adaptive = "src/resnet_bk/adaptive"
    assert touched == [
        f"{adaptive}/halving.py",
        f"{config}/techniques.py",
        f"{config}/model.py",
        f"{adaptive}/compose.py",
    ]
    (tmp_path / "text").mkdir()
    for i in range(2):
        (tmp_path / "text" / f"{i}.py").write_text("print('halve')\n" * 40)
    paths = f"{tmp_path / 'src'}{os.pathsep}{ROOT / 'tests' / 'contracts'}"
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(tmp_path / "text")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
