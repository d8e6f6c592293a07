"""Checkpoints: bits come back, every damage is seen, and no crash and no full disk loses the last good one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import assert_holds
from killing import ENVIRONMENT
from moreward import checkpoint as module
from moreward.checkpoint import CheckpointStore, sha256_file, verify_folder, write_json, write_manifest
from moreward.errors import ConfigError, RunError, SpaceError

HASHES = {"config_sha256": "c" * 64, "base_sha256": "b" * 64}
OUR_FILES = ("model.safetensors", "optimizer.safetensors", "best.safetensors", "rng.safetensors", "state.json")


def store_in(folder: Path, **hashes: str) -> CheckpointStore:
    return CheckpointStore(folder, hashes={**HASHES, **hashes})


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    bits = torch.Generator().manual_seed(step)
    names = ("model", "optimizer", "best", "rng")
    return {name: {f"{name}.w": torch.randn(4, 3, generator=bits), "n": torch.tensor(step)} for name in names}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the good checkpoints of steps 5 and 10."""
    store = store_in(tmp_path)
    for step in (5, 10):
        store.save(step, content(step), {"step": step})
    return tmp_path


# ---------------------------------------------------------------- what is saved comes back

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1) if x.ndim else x,
    "part of a larger one": lambda x: torch.cat([x.reshape(-1)] * 3)[x.numel() : 2 * x.numel()].reshape(x.shape),
    "every other": lambda x: x[..., ::2] if x.ndim else x,
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "a parameter": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
}


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    """Any bits (NaN payloads and -0 among them) of any type, shape and layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    bits = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=bits, dtype=torch.uint8)
    tensor = raw > 127 if dtype == torch.bool else raw.view(dtype)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](tensor.reshape(shape))


@settings(max_examples=60)
@given(st.lists(any_tensor(), max_size=4), st.booleans())
def test_every_tensor_comes_back_bit_for_bit(tensors: list[torch.Tensor], shared: bool) -> None:
    group = {f"t{place}": tensor for place, tensor in enumerate(tensors)}
    if shared:
        group |= {f"{name}.again": tensor for name, tensor in group.items()}
        group |= {
            f"{name}.flat": tensor.detach().view(-1)[1:] for name, tensor in group.items() if tensor.is_contiguous()
        }
    with tempfile.TemporaryDirectory() as folder:
        store = store_in(Path(folder))
        store.save(3, {"model": group, "optimizer": {}}, {"step": 3})
        assert_holds(store.newest(), 3, {"model": group, "optimizer": {}}, {"step": 3})


def test_what_was_loaded_can_be_saved_again(two: Path) -> None:
    store = store_in(two)
    found = store.newest()
    assert found is not None
    store.save(11, {name: found.tensors(name) for name in ("model", "best")}, {})
    assert_holds(store.newest(), 11, {name: content(10)[name] for name in ("model", "best")}, {})


def test_the_state_keeps_every_digit_and_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    state = {"lr": 0.1 + 0.2, "seed": 2**63, "names": ["é", "\u2028"], "best": None}
    store.save(1, content(1), state)
    assert_holds(store.newest(), 1, content(1), state)
    with pytest.raises(ValueError, match="JSON"):
        store.save(2, content(2), {"loss": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_asking_for_tensors_that_were_not_saved_names_those_that_were(two: Path) -> None:
    found = store_in(two).newest()
    assert found is not None
    with pytest.raises(RunError, match=r"no tensors named 'scheduler'. It has: best, model, optimizer, rng"):
        found.tensors("scheduler")


# ---------------------------------------------------------------- damage


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damages() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Name, what the reason must say, and the damage done to a checkpoint's folder."""
    for name in OUR_FILES:
        yield f"{name} missing", f"{name}: missing", lambda at, n=name: (at / n).unlink()
        yield f"{name} cut in half", f"{name}: has", lambda at, n=name: rewrite(at / n, lambda b: b[: len(b) // 2])
        yield f"{name} emptied", f"{name}: has 0 bytes", lambda at, n=name: rewrite(at / n, lambda b: b"")
        yield (
            f"{name} changed",
            f"{name}: content changed",
            lambda at, n=name: rewrite(at / n, lambda b: flip(b, -2 % len(b))),
        )
    manifest = "manifest.json"
    yield "folder empty", "manifest.json: missing", lambda at: [path.unlink() for path in at.iterdir()]
    yield "manifest missing", "manifest.json: missing", lambda at: (at / manifest).unlink()
    yield (
        "manifest cut in half",
        "manifest.json: unreadable",
        lambda at: rewrite(at / manifest, lambda b: b[: len(b) // 2]),
    )
    yield "manifest emptied", "manifest.json: unreadable", lambda at: rewrite(at / manifest, lambda b: b"")
    yield "manifest not an object", "manifest.json: unreadable", lambda at: (at / manifest).write_text("[1]")
    yield (
        "manifest of another step",
        "step is 5, expected 10",
        lambda at: shutil.copy(at.parent / "step-00000005" / manifest, at / manifest),
    )
    yield (
        "manifest not complete",
        "complete is False, expected True",
        lambda at: rewrite(at / manifest, lambda b: b.replace(b'"complete": true', b'"complete": false')),
    )
    yield (
        "another configuration",
        "config_sha256 is 'dddd",
        lambda at: rewrite(at / manifest, lambda b: b.replace(b"c" * 64, b"d" * 64)),
    )
    yield (
        "a file that is a folder",
        "state.json: missing",
        lambda at: ((at / "state.json").unlink(), (at / "state.json").mkdir()),
    )
    for name in ("training_args.bin", "optimizer.pt", "rng.pkl", "__0_0.distcp", ".metadata"):
        yield f"{name} added", f"{name}: refused", lambda at, n=name: (at / n).write_bytes(b"cos\nsystem\n.")


@pytest.mark.parametrize(("reason", "damage"), [pytest.param(r, d, id=name) for name, r, d in damages()])
def test_a_damaged_newest_checkpoint_gives_way_to_the_older_one_and_says_why(
    two: Path, reason: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(two / "step-00000010")
    store = store_in(two)
    assert_holds(store.newest(), 5, content(5), {"step": 5})
    assert len(store.skipped) == 1
    assert store.skipped[0].startswith("step-00000010: ")
    assert reason in store.skipped[0]
    assert caplog.messages == [f"checkpoint skipped: {store.skipped[0]}"]


def test_no_changed_byte_of_any_file_is_ever_loaded(two: Path) -> None:
    """Any one byte of any file: the checkpoint is skipped, or (spaces and dates of the manifest) says the same."""
    at, store = two / "step-00000010", store_in(two)
    originals = {path: path.read_bytes() for path in at.iterdir()}

    @settings(max_examples=60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(originals)))
        place = data.draw(st.integers(0, len(originals[path]) - 1))
        new = data.draw(st.integers(0, 255).filter(lambda byte: byte != originals[path][place]))
        path.write_bytes(originals[path][:place] + bytes([new]) + originals[path][place + 1 :])
        try:
            found = store.newest()
            assert found is not None
            assert path.name == "manifest.json" or found.step == 5
            assert_holds(found, found.step, content(found.step), {"step": found.step})
        finally:
            path.write_bytes(originals[path])

    check()


def test_a_booby_trapped_pickle_is_refused_and_never_runs(two: Path) -> None:
    marker = two / "ran"
    (two / "step-00000010" / "optimizer.pt").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    store = store_in(two)
    assert_holds(store.newest(), 5, content(5), {"step": 5})
    assert "Convert it to safetensors" in store.skipped[0]
    assert not marker.exists()


def test_two_damaged_checkpoints_are_both_named(two: Path) -> None:
    store_in(two).save(12, content(12), {})
    (two / "step-00000010" / "state.json").unlink()
    (two / "step-00000012" / "model.safetensors").unlink()
    store = store_in(two)
    with pytest.raises(RunError) as raised:
        store.newest()
    assert "step-00000012: model.safetensors: missing\n  step-00000010: state.json: missing" in str(raised.value)


def test_only_an_untouched_folder_means_a_fresh_start(tmp_path: Path) -> None:
    assert store_in(tmp_path / "none").newest() is None
    (tmp_path / "tmp-3-1").mkdir()
    assert store_in(tmp_path).newest() is None
    (tmp_path / "step-00000003").write_text("a file")
    with pytest.raises(RunError, match=r"step-00000003: manifest.json: unreadable"):
        store_in(tmp_path).newest()


def test_a_file_that_cannot_be_read_is_a_fault_not_a_crash(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        if path == two / "step-00000010" / "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_file(path)

    monkeypatch.setattr(module, "sha256_file", read)
    store = store_in(two)
    assert_holds(store.newest(), 5, content(5), {"step": 5})
    assert "model.safetensors: unreadable (Input/output error)" in store.skipped[0]


def test_a_sealed_folder_may_have_folders_and_points_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "experts" / "code").mkdir(parents=True)
    (folder / "experts" / "code" / "adapter.safetensors").write_bytes(b"1234")
    (folder / ".manifest.json.tmp").write_bytes(b"left by a crash")
    write_manifest(folder, base_sha256="b")
    write_manifest(folder, base_sha256="b")
    assert verify_folder(folder) == []
    assert verify_folder(folder, expected={"base_sha256": "a"}) == ["manifest.json: base_sha256 is 'b', expected 'a'"]
    (folder / "README.md").write_text("added later")
    assert verify_folder(folder) == []
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"../outside.txt": {"sha256": sha256_file(outside), "bytes": 1}}
    write_json(folder / "manifest.json", manifest)
    assert verify_folder(folder) == ["../outside.txt: missing"]


def test_a_json_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


# ---------------------------------------------------------------- what is kept


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept(two: Path) -> None:
    store_in(two).save(20, content(20), {})
    assert names_in(two) == ["step-00000010", "step-00000020"]


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(two: Path) -> None:
    store = store_in(two)
    (two / "step-00000010" / "model.safetensors").unlink()
    store.save(20, content(20), {})
    assert names_in(two) == ["step-00000005", "step-00000010", "step-00000020"]
    store.save(30, content(30), {})
    assert names_in(two) == ["step-00000020", "step-00000030"]


def test_fewer_than_two_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep: must be at least 2"):
        CheckpointStore(tmp_path, hashes={}, keep=1)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_step_saved_again_is_replaced(two: Path, damaged: bool) -> None:
    store = store_in(two)
    if damaged:
        (two / "step-00000010" / "model.safetensors").unlink()
    store.save(10, content(11), {"again": True})
    assert_holds(store.newest(), 10, content(11), {"again": True})
    assert names_in(two) == ["step-00000005", "step-00000010"]


def test_leftovers_of_dead_processes_are_removed_and_named(two: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (two / f"tmp-11-{pid}").mkdir()
        (two / f"tmp-11-{pid}" / "model.safetensors").write_bytes(b"half")
    store = store_in(two)
    assert_holds(store.newest(), 10, content(10), {"step": 10})
    assert store.clean() == sorted([f"tmp-11-{dead.pid}", f"tmp-11-{os.getpid()}"])
    assert names_in(two) == ["step-00000005", "step-00000010", f"tmp-11-{os.getppid()}"]


# ---------------------------------------------------------------- the disk is full


def test_too_little_space_is_said_before_anything_is_written(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = sum(path.stat().st_size for path in (two / "step-00000010").iterdir())
    usage = shutil.disk_usage(two)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.2 * last) - 1))
    with pytest.raises(SpaceError, match=r"^no space: need 0.0 MB have 0.0 MB in .*\. .* kept"):
        store_in(two).save(20, content(20), {})
    assert names_in(two) == ["step-00000005", "step-00000010"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.2 * last) + 1))
    store_in(two).save(20, content(20), {})


def test_the_first_save_needs_space_for_its_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4_000_000))
    with pytest.raises(SpaceError, match=r"^no space: need 4\.8 MB have 4\.0 MB"):
        store_in(tmp_path).save(1, {"model": {"w": torch.zeros(1_000_000)}}, {})


@pytest.mark.parametrize("call", range(1, 11))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_at_any_write_leaves_no_trace(
    two: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    before = names_in(two)
    with pytest.raises(SpaceError, match="no space"):
        store_in(two).save(20, content(20), {})
    monkeypatch.undo()
    assert names_in(two) in (before, [*before, "step-00000020"])
    found = store_in(two).newest()
    assert found is not None
    assert_holds(found, found.step, content(found.step), {} if found.step == 20 else {"step": 10})


def test_another_failure_keeps_its_own_error_and_leaves_no_trace(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        store_in(two).save(20, content(20), {})
    assert names_in(two) == ["step-00000005", "step-00000010"]


ON_A_SMALL_DISK = """
import os, shutil, sys, torch
from pathlib import Path
from moreward.errors import SpaceError
from moreward.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]) / "run", hashes={})
def save(step, size):
    try:
        store.save(step, {"model": {"w": torch.full((size,), float(step))}}, {})
    except SpaceError as error:
        assert str(error).startswith("no space: "), error
        return f"refused {error}"
assert save(1, 100_000) is None and save(2, 100_000) is None
usage = shutil.disk_usage
print(save(3, 500_000))
shutil.disk_usage = lambda folder: usage(folder)._replace(free=10**9)  # the free space is gone before it is used
print(save(3, 500_000))
shutil.disk_usage = usage
assert sorted(os.listdir(store.folder)) == ["step-00000001", "step-00000002"]
assert store.newest().tensors("model")["w"].tolist() == [2.0] * 100_000
assert save(3, 100_000) is None and store.newest().step == 3
print("went on")
"""


def test_a_real_full_disk_is_refused_before_and_survived_in_the_middle(tmp_path: Path) -> None:
    """A tmpfs of 2 MB, in a mount namespace of its own that ends with the process."""
    mount = f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}"'
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    run = f'{mount} && "{sys.executable}" -c "$0" "{tmp_path}"'
    child = subprocess.run(
        ["unshare", "-rm", "sh", "-c", run, ON_A_SMALL_DISK],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    before, middle, after = child.stdout.splitlines()
    assert before.startswith("refused no space: need 2.4 MB have 1.3 MB")
    assert "filled up while writing" in middle
    assert after == "went on"
