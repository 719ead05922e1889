"""Choosing the folder of a run, and what counts as a run."""

import os

import pytest

from resnet_bk import files
from resnet_bk.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from resnet_bk.folders import cache_folder, check_same_run, check_same_text, is_begun, run_folder


def settings(folder, resume=False):
    return TrainConfig(ModelConfig(d_model=16), DataConfig(), output_dir=str(folder), max_steps=1, resume=resume)


@pytest.fixture
def chosen(tmp_path):
    """Return the folder that a run gets, and what was printed."""

    def choose(resume=False, name="run"):
        said = []
        with run_folder(settings(tmp_path / name, resume), said.append) as folder:
            return folder, said

    return choose


def test_a_new_folder_holds_a_lock_and_nothing_else(tmp_path):
    with run_folder(settings(tmp_path / "run"), pytest.fail) as folder:
        assert [path.name for path in folder.iterdir()] == [files.LOCK]
        with pytest.raises(ConfigError, match="in use"), run_folder(settings(folder, resume=True), pytest.fail):
            pass
    assert not folder.exists()


def test_a_run_is_resumed_only_if_it_is_asked_for(tmp_path, chosen):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="holds a run already"):
        chosen()
    assert chosen(resume=True)[0] == tmp_path / "run"
    for text in ("", "[]", "{", "{}", "[" * 100_000, "\xff"):
        (tmp_path / "run" / "results.json").write_text(text, "latin-1")
        with pytest.raises(ConfigError, match=r"results\.json is damaged; restore it, or remove it"):
            chosen(resume=True)
    (tmp_path / "run" / "results.json").write_text('{"training": {"steps": 1, "seconds": 9.5}}')
    folder, said = chosen(resume=True)
    assert folder == tmp_path / "run-2"
    assert said == [f"{tmp_path / 'run'} is finished; starting a new run in {tmp_path / 'run'}-2"]


@pytest.mark.parametrize(
    ("budget", "goes_on"),
    [
        ({"max_steps": 8}, False),
        ({"max_steps": 7}, False),
        ({"max_steps": 9}, True),
        ({"max_seconds": 20.0}, False),
        ({"max_seconds": 21.0}, True),
        ({"max_seconds": 21.0, "max_steps": 8}, False),
    ],
)
def test_a_finished_run_goes_on_where_the_budget_leaves_steps(tmp_path, budget, goes_on):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "results.json").write_text('{"training": {"steps": 8, "seconds": 20.5}}')
    said = []
    config = TrainConfig(**{"output_dir": str(tmp_path / "run"), "resume": True, "max_steps": None, **budget})
    with run_folder(config, said.append) as folder:
        assert folder == (tmp_path / "run" if goes_on else tmp_path / "run-2")
    assert ("learning rate" in said[0]) is goes_on


def test_folders_of_others_are_refused_even_to_resume(tmp_path, chosen):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not a run of this program"):
            chosen(resume)
        with pytest.raises(ConfigError, match="not a folder"):
            chosen(resume, "file")


def test_leftovers_of_a_kill_at_the_start_count_as_nothing_begun(tmp_path, chosen):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (files.LOCK, ".config.yaml.12-0123abcd.partial", "config.yaml", "text.sha256"):
        (folder / name).write_text("")
    (folder / "checkpoints").mkdir()
    assert not is_begun(folder)
    for resume in (False, True):
        assert chosen(resume)[0] == folder
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "text.sha256", "checkpoints"}
    (folder / "text.sha256").write_text("another")
    check_same_text("source", "hash", folder)
    check_same_run(settings(folder), folder)


def test_an_empty_configuration_beside_checkpoints_is_a_damaged_run(tmp_path, chosen):
    (tmp_path / "run" / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="holds a run already"):
        chosen()
    with pytest.raises(ConfigError, match=r"config\.yaml holds None instead of settings"):
        check_same_run(settings(tmp_path / "run"), tmp_path / "run")


def test_an_empty_text_hash_is_not_another_text(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "text.sha256").write_text("")
    check_same_text("source", "hash", tmp_path)
    (tmp_path / "text.sha256").write_text("other\n")
    with pytest.raises(ConfigError, match="has changed since the run"):
        check_same_text("source", "hash", tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path, chosen, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(ConfigError, match="is not a file; move it away"):
        chosen(resume=True)


@pytest.mark.parametrize("given", [None, "", "relative/cache"])
def test_caches_are_in_the_home_directory_unless_an_absolute_path_is_given(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / ".cache" / "resnet-bk"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "resnet-bk"
