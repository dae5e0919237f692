import dataclasses

import pytest

from gmm_jepa.config import Sources
from gmm_jepa.errors import InputError
from gmm_jepa.files import written_aside
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.folder import RunFolder

SOURCES = Sources(audio=("somewhere",))


def test_a_run_can_be_opened_twice_with_equal_settings(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(SOURCES, PRESETS["cpu"]())
    folder.open(SOURCES, PRESETS["cpu"]())
    assert folder.read() == (SOURCES, PRESETS["cpu"]())


def test_settings_may_be_mended_until_there_is_a_result(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    mended = dataclasses.replace(recipe, seed=7)
    (folder.root / "audio.json").write_text("{}")
    folder.open(SOURCES, mended)
    assert folder.read() == (SOURCES, mended)
    assert not (folder.root / "audio.json").exists()


def test_settings_that_do_not_bind_may_change_at_any_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    folder.checkpoints.mkdir()
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=0))
    folder.open(SOURCES, other)
    assert folder.read() == (SOURCES, other)


def test_other_settings_are_refused_naming_what_differs(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    folder.checkpoints.mkdir()
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=7))
    with pytest.raises(InputError, match=r"recipe\.train\.steps: there \d+, here 7"):
        folder.open(SOURCES, other)
    assert folder.read() == (SOURCES, recipe)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        RunFolder(tmp_path).open(SOURCES, PRESETS["cpu"]())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_reading_where_no_run_is(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        RunFolder(tmp_path / "nowhere").read()


def test_a_damaged_config_is_one_clear_error(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(SOURCES, PRESETS["cpu"]())
    folder.config.write_text('{"sources": ')
    with pytest.raises(InputError, match="not JSON"):
        folder.read()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_and_fail():
        with written_aside(path) as aside:
            aside.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_and_fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    for content in ("a", "b"):
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["b"]
