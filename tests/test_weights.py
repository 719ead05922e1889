"""Safetensors files are read only if they have what is expected."""

import json

import pytest
import torch
from safetensors.torch import save_file

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.weights import check_headers, read_tensors, weight_files

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float64)}
GOOD = {"a": torch.randn(2, 3), "b": torch.tensor(1.5)}


def write(folder, tensors=None, name="model.safetensors"):
    save_file(GOOD if tensors is None else tensors, folder / name)
    return folder / name


def test_tensors_get_the_expected_dtypes(tmp_path):
    read = read_tensors(write(tmp_path, {"a": GOOD["a"].bfloat16(), "b": GOOD["b"].half()}), EXPECTED)
    assert torch.equal(read["a"], GOOD["a"].bfloat16().float())
    assert read["b"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": torch.zeros(3, 2)}, r"'a': expected shape \(2, 3\), got \(3, 2\); the file is of another model"),
        ({"b": torch.zeros(1)}, r"'b': expected shape \(\), got \(1,\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.int8)}, "'a': expected F64, F32, F16, BF16, got I8"),
        ({"a": torch.zeros(2, 3, dtype=torch.complex64)}, "'a': .*got C64"),
        ({"a": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, "'a': .*got F8_E4M3"),
        ({"a": torch.full((2, 3), torch.nan)}, "'a': has a NaN or an infinity"),
        ({"a": torch.full((2, 3), 1e300, dtype=torch.float64)}, "'a': has a NaN or an infinity, in torch.float32"),
        ({"c": torch.zeros(1)}, "unexpected 'c'"),
    ],
)
def test_other_tensors_are_refused(change, words, tmp_path):
    path = write(tmp_path, GOOD | change)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tensors(path, EXPECTED)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_may_be_missing_only_where_they_are_not_required(tmp_path):
    path = write(tmp_path, {"a": GOOD["a"]})
    with pytest.raises(CheckpointError, match="missing 'b'"):
        read_tensors(path, EXPECTED)
    assert set(read_tensors(path, EXPECTED, ["a"])) == {"a"}


def test_a_name_of_an_earlier_version_counts_as_the_current_one(tmp_path):
    path = write(tmp_path, {"x.way_out.y": torch.ones(1)})
    assert set(read_tensors(path, {"x.bypass.y": torch.zeros(1)})) == {"x.bypass.y"}


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 100, (8).to_bytes(8, "little") + b"[[[[[[[[", None])
def test_a_damaged_or_missing_file_is_named(data, tmp_path):
    path = tmp_path / "model.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors") as caught:
        read_tensors(path, EXPECTED)
    assert str(path) in str(caught.value)


def test_weights_in_several_files_are_found_by_their_index(tmp_path):
    write(tmp_path, {"a": GOOD["a"]}, "one.safetensors")
    write(tmp_path, {"b": GOOD["b"]}, "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    files = weight_files(tmp_path)
    assert check_headers(files, EXPECTED) == {"a": files[0], "b": files[1]}
    for damaged in (
        '{"weight_map": {"a": "../one.safetensors"}}',
        '{"weight_map": 3}',
        "[1]",
        "{x",
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json: (expected a weight_map|lists a file)"):
            weight_files(tmp_path)


def test_a_file_that_torch_cannot_open_is_named_in_one_line(tmp_path, monkeypatch):
    def fails(path, framework):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Input/output error (5)\nbacktrace")

    monkeypatch.setattr("resnet_bk.weights.safe_open", fails)
    with pytest.raises(
        CheckpointError, match=r"w\.safetensors: cannot be read as safetensors .*Input/output error \(5\)\);"
    ):
        read_tensors(tmp_path / "w.safetensors", {})


def test_a_missing_file_is_named_whatever_its_path_is(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        check_headers([tmp_path / "allocate memory.safetensors"], EXPECTED)


def test_an_index_of_no_tensors_is_damaged(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match=r"index\.json: expected a weight_map .*empty.*damaged"):
        weight_files(tmp_path)
