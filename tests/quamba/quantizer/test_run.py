"""The folder a run works in: resumable, locked, swapped in whole, and careful with what else is on disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import QuambaError
from quamba.formats import artifact
from quamba.formats import run as run_folder
from quamba.formats.run import MARK
from quamba.quantizer import pipeline
from quamba.recipe import configs_dir
from tests.quamba.quantizer.conftest import Stop, contents, stop_before


def test_an_existing_output_is_refused_and_replaced_on_demand(tiny, run, tmp_path):
    source, out = tiny(), tmp_path / "out"
    run(source, out)
    before = contents(out)
    with pytest.raises(QuambaError, match=r"out exists: choose another folder or replace it with --overwrite"):
        run(source, out, calibration=torch.zeros(1, 4, dtype=torch.int64))
    assert contents(out) == before
    run(source, out, calibration=torch.arange(8).view(1, 8), overwrite=True)
    assert contents(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


def test_overwrite_replaces_nothing_but_models(tiny, run, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for place in (out, tiny("source")):
        before = contents(place)
        with pytest.raises(QuambaError, match="holds something else than a quantized model"):
            run(tiny(), place, overwrite=True)
        assert contents(place) == before
    (tmp_path / "file").write_text("a file")
    with pytest.raises(QuambaError, match="is no folder"):
        run(tiny(), tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    run(tiny(), tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("place", [".", "..", "sub/.."])
def test_the_current_folder_is_not_swallowed(tiny, run, tmp_path, monkeypatch, place):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    source = tiny()
    with pytest.raises(QuambaError, match="exists"):
        run(source, place)
    with pytest.raises(QuambaError, match="something else than a quantized model"):
        run(source, place, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "tiny"]


def test_a_run_torn_off_at_any_block_resumes_to_the_same_files(tiny, run, tmp_path, monkeypatch):
    source = tiny(layers=4)
    run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for block in range(4):
        out = tmp_path / f"torn{block}"
        with pytest.raises(Stop), stop_before(block):
            run(source, out)
        partial = tmp_path / f"torn{block}.partial"
        assert not out.exists()
        assert json.loads((partial / "run.json").read_text())["done"] == block
        with pytest.raises(QuambaError):
            QuambaLMHeadModel.from_pretrained(partial)
        worked = []
        original = pipeline._Job._block

        def counted(self, index, original=original, worked=worked):
            worked.append(index)
            original(self, index)

        monkeypatch.setattr(pipeline._Job, "_block", counted)
        run(source, out)
        monkeypatch.undo()
        assert worked == list(range(block, 4))  # nothing is done twice
        assert contents(out) == expected
        assert not partial.exists()


@pytest.mark.parametrize("change", ["recipe", "calibration", "model", "dtype"])
def test_a_partial_folder_of_another_run_is_not_continued(tiny, run, tmp_path, change):
    source, out = tiny(), tmp_path / "out"
    with pytest.raises(Stop), stop_before(1):
        run(source, out)
    (tmp_path / "out.partial" / "stray.txt").write_text("left over")
    options = {}
    if change == "recipe":
        text = (configs_dir() / "mamba1-w8a8.yaml").read_text().replace("observer: minmax", "observer: mse")
        (tmp_path / "other.yaml").write_text(text)
        options = {"recipe": str(tmp_path / "other.yaml")}
    elif change == "calibration":
        options = {"calibration": torch.arange(24).view(2, 12)}
    elif change == "dtype":
        options = {"dtype": "bfloat16"}
    else:
        tiny(seed=1)  # other weights in the same folder
    run(source, out, **options)
    run(source, tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"key": 1}', b'{"key": {}, "done": "x"}', b"\xff"])
def test_a_damaged_run_json_starts_over(tiny, run, tmp_path, garbage):
    source, out = tiny(), tmp_path / "out"
    with pytest.raises(Stop), stop_before(1):
        run(source, out)
    (tmp_path / "out.partial" / "run.json").write_bytes(garbage)
    run(source, out)
    run(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_into_the_same_folder_is_refused(tiny, run, tmp_path):
    source, out = tiny(), tmp_path / "out"
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "run.json").write_text("x")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(QuambaError, match=r"another process is quantizing or converting into .*out right now"):
            run(source, out)
        assert contents(partial) == {"run.json": b"x"}
        other.stdin.close()
        other.wait(10)
    run(source, out)  # the lock ended with its process
    assert not partial.exists()


def test_the_lock_is_released_after_success_refusal_and_failure(tiny, run, tmp_path):
    source, out = tiny(), tmp_path / "out"
    run(source, out)
    (out / MARK).write_bytes(b"{}")
    out.rename(tmp_path / "out.old")  # killed between the two renames
    with pytest.raises(QuambaError, match="exists"):
        run(source, out)
    assert contents(out)  # repaired
    run(source, out, overwrite=True)
    with pytest.raises(Stop), stop_before(0):
        run(source, out, overwrite=True)
    handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_an_interrupted_swap_is_repaired(tiny, run, tmp_path):
    source, out, old = tiny(), tmp_path / "out", tmp_path / "out.old"
    run(source, out)
    expected = contents(out)
    # Killed after the new folder moved in, before the old one was deleted.
    old.mkdir()
    (old / MARK).write_bytes(b"{}")
    (old / "half.safetensors").write_bytes(b"deleted half way")
    run(source, out, overwrite=True)
    assert not old.exists()
    assert contents(out) == expected
    # Killed in between: the old artifact is the only one, and comes back when the next run is torn off.
    (out / MARK).write_bytes(b"{}")
    out.rename(old)
    with pytest.raises(Stop), stop_before(0):
        run(source, out, overwrite=True)
    assert contents(out) == expected
    assert not old.exists()


@pytest.mark.parametrize("complete", [False, True])
def test_a_folder_torn_off_while_it_is_cleared_is_still_ours(tmp_path, monkeypatch, complete):
    """Whatever order it is cleared in, and whether a model was finished in it or not."""
    partial, unlink = tmp_path / "out.partial", Path.unlink

    def fill():
        partial.mkdir(exist_ok=True)
        for name in ("a", "b", "block-00000.safetensors"):
            (partial / name).write_text("x")
        if complete:  # what `is_artifact` knows a model by
            (partial / "config.json").write_text(json.dumps({"model_type": "quamba", "architectures": ["Quamba"]}))
        else:
            (partial / "run.json").write_text(json.dumps({"key": {"other": 1}, "done": 0}))

    monkeypatch.setattr(run_folder, "is_artifact", lambda folder: (folder / "config.json").exists())
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted((self / name for name in os.listdir(self)), reverse=True))
    for steps in range(3):
        fill()
        left = [steps]

        def tear(self, missing_ok=False, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            unlink(self, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", tear)
            with pytest.raises(KeyboardInterrupt), run_folder.RunFolder(tmp_path / "out", overwrite=False) as folder:
                folder.resume({"mine": 1})
        assert partial.exists()
    with run_folder.RunFolder(tmp_path / "out", overwrite=False) as folder:
        assert folder.resume({"mine": 1}) == -1
        assert [p.name for p in partial.iterdir()] == ["run.json"]


def test_somebodys_own_folder_of_that_name_is_left_alone(tiny, run, tmp_path):
    source, out, old = tiny(), tmp_path / "out", tmp_path / "out.old"
    run(source, out)
    out.rename(old)  # a backup, by hand
    kept = contents(old)
    run(source, out)
    assert contents(old) == kept and contents(out) == kept
    with pytest.raises(QuambaError, match=r"out\.old is in the way"):
        run(source, out, overwrite=True)
    assert contents(old) == kept and contents(out) == kept


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["shard", "stream", "sync"])
def test_a_disk_that_fills_up_says_so_and_the_run_resumes(tiny, run, tmp_path, monkeypatch, where):
    source, out = tiny(layers=3), tmp_path / "out"
    run(source, tmp_path / "whole")
    owner, name = {
        "shard": (artifact.ArtifactWriter, "write"),
        "stream": (pipeline.Stream, "write"),
        "sync": (os, "fsync"),
    }[where]
    original = getattr(owner, name)
    count = 0

    def later(*args):
        nonlocal count
        count += 1
        return full_disk() if count == 3 else original(*args)

    monkeypatch.setattr(owner, name, later)
    with pytest.raises(QuambaError, match=r"no space left on the device of .* run the same command again") as full:
        run(source, out)
    assert str(full.value).endswith("it resumes after the last finished block") == (where != "sync")
    monkeypatch.undo()
    assert not out.exists()
    run(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_too_little_space_is_seen_before_anything_is_written(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    source = tiny()
    with pytest.raises(QuambaError, match="has 0 MB left and this run needs about 1 MB: choose another folder"):
        run(source, tmp_path / "new" / "deep" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where the kernel and the user's rights allow one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if os.geteuid() == 0
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk(tiny, run, tmp_path, monkeypatch, small_disk):
    source = tiny(layers=3, hidden=64)
    run(source, tmp_path / "whole")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_050_000))
    with pytest.raises(QuambaError, match="MB left and this run needs"):
        run(source, small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
    monkeypatch.setattr("quamba.formats.run.RunFolder.need", lambda self, nbytes, advice="": None)
    with pytest.raises(QuambaError, match="no space left on the device"):
        run(source, small_disk / "out")
    assert not (small_disk / "out").exists()
    filler.unlink()
    run(source, small_disk / "out")
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_places_that_cannot_be_written_to(tiny, run, tmp_path):
    source = tiny()
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b", Path("/proc/self/out"), Path("/sys/a/b")):
        with pytest.raises(QuambaError, match=f"can't write to .*{place.parts[1]}"):
            run(source, place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "tiny"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tiny, run, tmp_path):
    source, locked = tiny(), tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(QuambaError, match=r"can't write to .*locked"):
        run(source, locked / "out")


def test_a_partial_folder_that_no_run_made_is_not_emptied(tiny, run, tmp_path):
    source, out, partial = tiny(), tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("x")
    with pytest.raises(QuambaError, match="is in the way"):
        run(source, out)
    assert (partial / "thesis.txt").read_text() == "x" and not out.exists()


def test_a_mark_that_was_left_behind_does_not_turn_a_backup_into_ours(tiny, run, tmp_path):
    source, out, backup = tiny(), tmp_path / "out", tmp_path / "out.old"
    run(source, out)
    expected = contents(out)
    (out / MARK).write_bytes(b"{}")  # killed after marking, before moving
    with pytest.raises(Stop), stop_before(0):
        run(source, out, overwrite=True)
    assert contents(out) == expected
    out.rename(backup)
    run(source, out)
    assert contents(backup) == expected == contents(out)


def test_a_dangling_link_is_refused_before_the_work(tiny, run, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(QuambaError, match="is no folder"):
        run(tiny(), tmp_path / "out", overwrite=True)
