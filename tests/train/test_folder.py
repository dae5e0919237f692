import dataclasses
import multiprocessing
import threading
import time

import pytest

from gmm_jepa.config import Sources
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json, written_aside
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.folder import RunFolder, held

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
    (folder.root / "gmm.safetensors.partial").write_text("")
    folder.checkpoints.mkdir()  # of a first one that could not be written
    folder.open(SOURCES, mended)
    assert folder.read() == (SOURCES, mended)
    assert {path.name for path in folder.root.iterdir()} == {"config.json", "checkpoints"}


def test_settings_that_do_not_bind_may_change_at_any_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    folder.checkpoints.mkdir()
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=0))
    folder.open(SOURCES, other)
    assert folder.read() == (SOURCES, other)


def test_a_setting_that_is_new_has_the_value_that_stands_for_how_things_were(tmp_path):
    folder, recipe = RunFolder(tmp_path / "run"), PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    folder.checkpoints.mkdir()
    values = read_json(folder.config)
    del values["recipe"]["train"]["cuda_graphs"]
    write_json(folder.config, values)
    folder.open(SOURCES, recipe)
    assert folder.read() == (SOURCES, recipe)


def test_other_settings_are_refused_naming_what_differs(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = PRESETS["cpu"]()
    folder.open(SOURCES, recipe)
    (folder.checkpoints / "step_00000005").mkdir(parents=True)
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=7))
    with pytest.raises(InputError, match=r"recipe\.train\.steps: there \d+, here 7"):
        folder.open(SOURCES, other)
    assert folder.read() == (SOURCES, recipe)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        RunFolder(tmp_path).open(SOURCES, PRESETS["cpu"]())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    root, peers = tmp_path / "some" / "run", Processes(rank=0, world_size=1, device="cpu")
    with held(root, peers):
        (root / "config.json").write_text("{}")
        with (
            pytest.raises(InputError, match="another process works here"),
            held(root, peers),
        ):
            pass
        with held(root, dataclasses.replace(peers, rank=1)):  # one of the same run's
            pass
    with held(root, peers):
        pass
    assert [path.name for path in root.iterdir()] == ["config.json"]


def _started_and_asleep(started) -> None:
    started.set()
    time.sleep(60)


def test_a_folder_is_free_though_a_worker_of_its_run_lives(tmp_path):
    peers = Processes(rank=0, world_size=1, device="cpu")
    fork = multiprocessing.get_context("fork")
    (tmp_path / "config.json").write_text("{}")
    started = fork.Event()
    with held(tmp_path, peers):
        worker = fork.Process(target=_started_and_asleep, args=(started,))
        worker.start()
        assert started.wait(30)
    try:
        with held(tmp_path, peers):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_who_is_refused_leaves_the_folder_as_it_is(tmp_path):
    root, peers = tmp_path / "run", Processes(rank=0, world_size=1, device="cpu")
    with held(root, peers):
        for _ in "12":
            with pytest.raises(InputError, match="another process"), held(root, peers):
                pass
    assert not root.exists()


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    peers = Processes(rank=0, world_size=1, device="cpu")
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "run", peers):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_that_was_there_stays(tmp_path):
    with held(tmp_path, Processes(rank=0, world_size=1, device="cpu")):
        pass
    assert tmp_path.is_dir()


def test_a_folder_that_comes_and_goes_has_one_holder(tmp_path):
    """Each of three threads makes it, locks it and removes it again."""
    peers, root = Processes(rank=0, world_size=1, device="cpu"), tmp_path / "run"
    inside, errors, n_held = [], [], []

    def hold() -> None:
        for _ in range(1000):
            try:
                with held(root, peers):
                    inside.append(1)
                    n_held.append(1)
                    if len(inside) != 1 or not root.is_dir():
                        errors.append("held twice, or gone")
                    inside.pop()
            except InputError as error:
                if "another process works here" not in str(error):
                    errors.append(str(error))

    threads = [threading.Thread(target=hold) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert n_held
    assert not root.exists() or not list(root.iterdir())


def test_what_is_no_folder_is_named(tmp_path):
    peers, file = Processes(rank=0, world_size=1, device="cpu"), tmp_path / "notes.txt"
    file.write_text("mine")
    for root, said in ((file, "is a file"), (file / "sub", "no folder can be made here")):
        with pytest.raises(InputError, match=said), held(root, peers):
            pass
    assert file.read_text() == "mine"


def test_reading_where_no_run_is(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        RunFolder(tmp_path / "nowhere").read()
    with pytest.raises(InputError, match="no run here"):
        RunFolder(tmp_path).read()


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


def test_permissions_are_those_of_the_umask(tmp_path):
    """Whatever the library that writes gives."""
    with written_aside(tmp_path / "file") as aside:
        aside.touch(mode=0o600)
    with written_aside(tmp_path / "folder") as aside:
        (aside / "in").mkdir(parents=True)
        (aside / "in" / "file").touch(mode=0o600)
    (tmp_path / "usual").touch()
    for path in (tmp_path / "file", tmp_path / "folder" / "in" / "file"):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_folders_are_replaced_whole(tmp_path):
    path = tmp_path / "folder"
    for content in ("a", "b"):
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["b"]
