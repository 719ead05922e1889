"""``resnet-bk seal``: a new manifest for files that were changed on purpose."""

import json

from resnet_bk.checkpoint import MANIFEST, seal
from resnet_bk.cli import main
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer


def test_a_changed_model_is_read_again_once_it_is_sealed(tmp_path, capsys):
    folder = tmp_path / "model"
    ResNetBKForCausalLM(ResNetBKConfig(d_model=8, n_layers=1, num_experts=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    seal(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"n_seq": 77}
    (folder / "config.json").write_text(json.dumps(settings))
    generate = ["generate", str(folder), "x", "--max_new_tokens", "1"]
    capsys.readouterr()
    assert main(generate) == 2
    assert "config.json: expected " in capsys.readouterr().err
    assert main(["seal", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / MANIFEST}\n"
    assert main(generate) == 0


def test_only_the_folder_of_a_model_is_sealed(tmp_path, capsys):
    for folder, message in ((tmp_path / "missing", "no such checkpoint folder"), (tmp_path, "expected 'config.json'")):
        assert main(["seal", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"resnet-bk: error: {folder}: {message}")
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
