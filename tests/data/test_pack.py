from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from unittest import mock

import numpy as np
import pytest

from gmm_jepa.data import pack as pack_module
from gmm_jepa.data import packed as packed_module
from gmm_jepa.data.corpus import open_corpus, validate_corpus
from gmm_jepa.data.pack import pack_corpus
from gmm_jepa.data.packed import PackedCorpus, to_int16
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.errors import InputError
from gmm_jepa.locks import held


def opened(sources):
    return open_corpus(sources, rejects=RejectLog())


def content(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def labelled(speech_like, write_manifest):
    """A manifest of 24 files, one of them missing, with labels."""
    lines = [
        {"path": f"set/{i:02d}.wav", "text": f"words {i}", "phones": [[0, 0.1, "sil"]]}
        for i in range(24)
    ]
    lines[5]["duration"] = 0.4
    lines[5]["path"] = "set/absent.wav"
    return opened(write_manifest(lines))


def test_reads_what_the_source_reads(labelled, tmp_path):
    log = RejectLog()
    packed = pack_corpus(labelled, tmp_path / "pack", rejects=log, shard_s=3.0)
    assert log.summary() == "1 rejected (1 missing)"
    assert len(packed) == 23
    kept = [i for i in range(24) if i != 5]
    for j, i in enumerate(kept):
        np.testing.assert_array_equal(packed.read(j), labelled.read(i))
        np.testing.assert_array_equal(packed.read(j, 1_000, 77), labelled.read(i, 1_000, 77))
        into = np.full(77, np.nan, np.float32)
        packed.read_into(j, 1_000, into)
        np.testing.assert_array_equal(into, labelled.read(i, 1_000, 77))
        assert packed.entry(j) == labelled.entry(i)
    assert packed.durations_samples.tolist() == labelled.durations_samples[kept].tolist()
    assert len(list((tmp_path / "pack").glob("shard_*.npy"))) > 3
    assert not (tmp_path / "pack" / "partial").exists()
    assert packed.locate(0)[1] == 1
    packed.verify()
    assert validate_corpus(packed, log) is packed
    reopened = opened(tmp_path / "pack")
    assert isinstance(reopened, PackedCorpus)
    assert reopened.fingerprint == packed.fingerprint
    copy = pickle.loads(pickle.dumps(reopened))
    np.testing.assert_array_equal(copy.read(3), packed.read(3))


def test_few_file_descriptors_suffice(labelled, tmp_path):
    """A mapped shard holds one, and shells allow 1,024 where a corpus has 25,000 shards."""
    resource = pytest.importorskip("resource")
    expected = pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog(), shard_s=1.0)
    shutil.copytree(tmp_path / "pack", tmp_path / "copy")
    assert len(list((tmp_path / "pack").glob("shard_*.npy"))) > 10
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    audio = [expected.read(i) for i in order]
    few = lru_cache(5)(packed_module._mapped_shard.__wrapped__)
    packed_module._mapped_shard.cache_clear()
    n_open = len(os.listdir("/proc/self/fd"))
    try:
        with mock.patch.object(packed_module, "_mapped_shard", few), ThreadPoolExecutor(2) as pool:
            packs = [PackedCorpus(tmp_path / name) for name in ("pack", "copy")]
            resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 14, limits[1]))
            found = [list(pool.map(pack.read, order)) for pack in packs]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(map(np.array_equal, found[0] + found[1], audio + audio))
    for soft, most in ((1_024, 256), (2, 1), (65_536, 1_024), (resource.RLIM_INFINITY, 1_024)):
        with mock.patch.object(resource, "getrlimit", return_value=(soft, soft)):
            assert packed_module._most_open_shards() == most


def test_what_is_packed_counts_as_decoded(labelled, tmp_path):
    packed = pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog())
    assert packed.is_decoded.all()
    assert not labelled.is_decoded.any()
    both = opened([tmp_path / "pack", labelled.locate(0)[0]])
    assert both.is_decoded.tolist() == [True] * len(packed) + [False]
    assert both.select([len(packed), 0]).is_decoded.tolist() == [False, True]


def test_same_bytes_with_workers_and_on_repeat(labelled, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        pack_corpus(labelled, tmp_path / name, rejects=RejectLog(), shard_s=2.0, workers=workers)
    before = content(tmp_path / "a")
    assert before == content(tmp_path / "b")
    log, calls = RejectLog(), []
    again = pack_corpus(
        labelled,
        tmp_path / "a",
        rejects=log,
        shard_s=2.0,
        progress=lambda *done: calls.append(done),
    )
    assert calls == []
    assert log.count == 1
    assert len(again) == 23
    assert content(tmp_path / "a") == before


KILLED = """
import os, signal, sys
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.pack import pack_corpus
from gmm_jepa.data.rejects import RejectLog

def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

pack_corpus(open_corpus(sys.argv[1], rejects=RejectLog()), sys.argv[2], rejects=RejectLog(),
            shard_s=2.0, progress=progress)
"""


def test_killed_and_taken_up(labelled, tmp_path):
    whole = pack_corpus(labelled, tmp_path / "whole", rejects=RejectLog(), shard_s=2.0)
    out = tmp_path / "killed"
    for at in (1, 15):
        command = [sys.executable, "-c", KILLED, tmp_path / "set.jsonl", out, str(at)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        with pytest.raises(InputError, match="unfinished pack: run the same `gmm-jepa pack` again"):
            opened(out)
    done = len(list(out.glob("shard_*.npy")))
    assert done > 1
    log, calls = RejectLog(), []
    packed = pack_corpus(
        labelled, out, rejects=log, shard_s=2.0, progress=lambda *done: calls.append(done)
    )
    assert len(calls) < 20  # finished shards are not read again
    assert log.count == 1  # but their rejects are told again
    assert packed.fingerprint == whole.fingerprint
    assert content(out) == content(tmp_path / "whole")


def test_stopped_at_every_write_and_taken_up(labelled, tmp_path, monkeypatch):
    """Stop before and after each rename in turn; the end is always the same."""
    pack_corpus(labelled, tmp_path / "whole", rejects=RejectLog(), shard_s=4.0)
    wanted = content(tmp_path / "whole")
    replace, n_stops = os.replace, 0
    for after in (False, True):
        for stop_at in range(100):
            calls = iter(range(1_000))

            def stopping(source, target, calls=calls, stop_at=stop_at, after=after):
                stop = next(calls) == stop_at
                if not stop or after:
                    replace(source, target)
                if stop:
                    raise KeyboardInterrupt

            out = tmp_path / f"{after}{stop_at}"
            monkeypatch.setattr(pack_module.os, "replace", stopping)
            try:
                pack_corpus(labelled, out, rejects=RejectLog(), shard_s=4.0)
                finished = True
            except KeyboardInterrupt:
                finished = False
            monkeypatch.setattr(pack_module.os, "replace", replace)
            pack_corpus(labelled, out, rejects=RejectLog(), shard_s=4.0)
            assert content(out) == wanted
            shutil.rmtree(out)
            if finished:
                break
            n_stops += 1
    assert n_stops > 20


def test_damage_is_found(labelled, tmp_path):
    out = tmp_path / "pack"
    pack_corpus(labelled, out, rejects=RejectLog(), shard_s=4.0)
    shard = out / "shard_00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"changed since packing: shard_00001\.npy"):
        PackedCorpus(out).verify()
    shard.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"shard_00001\.npy: \d+ bytes are expected, found"):
        PackedCorpus(out)
    shard.unlink()
    with pytest.raises(InputError, match="found None"):
        opened(out)
    shard.write_bytes(whole)
    PackedCorpus(out).verify()
    summary = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps({**summary, "version": 99}))
    with pytest.raises(InputError, match="version 1 is expected"):
        PackedCorpus(out)
    with pytest.raises(InputError, match="is no pack"):
        PackedCorpus(tmp_path)


def test_a_folder_of_the_name_of_an_unfinished_pack_is_no_pack(labelled, tmp_path):
    (tmp_path / "pack" / "partial").mkdir(parents=True)
    (tmp_path / "pack" / "partial" / "mine").touch()
    with pytest.raises(InputError, match=r"is not empty and holds no pack \(mine, \.\.\.\)"):
        pack_corpus(labelled.select([0, 1]), tmp_path / "pack", rejects=RejectLog(None))
    assert (tmp_path / "pack" / "partial" / "mine").exists()


def test_other_contents_are_not_overwritten(labelled, tmp_path):
    pack_corpus(labelled.select([0, 1]), tmp_path / "pack", rejects=RejectLog())
    before = content(tmp_path / "pack")
    with pytest.raises(InputError, match=r"of other audio or settings \(the audio differs\): give"):
        pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog())
    with pytest.raises(InputError, match=r"shard_s is 3600\.0, here 9\): give another folder"):
        pack_corpus(labelled.select([0, 1]), tmp_path / "pack", rejects=RejectLog(), shard_s=9)
    assert content(tmp_path / "pack") == before
    with pytest.raises(InputError, match="not empty"):
        pack_corpus(labelled, tmp_path / "set", rejects=RejectLog())
    with pytest.raises(InputError, match="shard_s"):
        pack_corpus(labelled, tmp_path / "new", rejects=RejectLog(), shard_s=0)
    log = RejectLog()
    with pytest.raises(InputError, match="none of 1 utterances"):
        pack_corpus(labelled.select([5]), tmp_path / "new", rejects=log)
    assert log.count == 1


def test_one_process_packs_at_a_time(labelled, tmp_path):
    packed = pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog())
    with held(tmp_path / "pack"), pytest.raises(InputError, match="another process works here"):
        pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog())
    again = pack_corpus(labelled, tmp_path / "pack", rejects=RejectLog())
    assert again.fingerprint == packed.fingerprint


def test_clipping_is_counted_and_warned_of(write_audio, tmp_path):
    loud = np.array([0.5, 1.0, -1.0, 1.5, -7.0, 0.25], np.float32)
    write_audio("in/loud.wav", signal=loud, subtype="FLOAT")
    write_audio("in/quiet.wav")
    with pytest.warns(UserWarning, match=r"2 samples in 1 utterances lay outside"):
        packed = pack_corpus(opened(tmp_path / "in"), tmp_path / "pack", rejects=RejectLog())
    assert packed.n_clipped_samples == 2
    top = 32_767 / 32_768
    np.testing.assert_array_equal(packed.read(0), np.float32([0.5, top, -1, top, -1, 0.25]))


def test_int16_round_trip_is_exact():
    every = np.arange(-32_768, 32_768, dtype=np.int16)
    back, n_clipped = to_int16(every.astype(np.float32) / 32_768)
    np.testing.assert_array_equal(back, every)
    assert n_clipped == 0


def test_real_speech(shared, tmp_path):
    source = opened(shared / "speech" / "arctic.jsonl").select(np.arange(40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = pack_corpus(source, tmp_path / "pack", rejects=RejectLog(), shard_s=60)
    for i in range(40):
        np.testing.assert_array_equal(packed.read(i), source.read(i))
        assert packed.entry(i)["text"] == source.entry(i)["text"]
