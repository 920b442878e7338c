"""Reading pickled weights: real objects are tolerated, nothing is ever executed."""

import argparse
import datetime
import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from avion_dali.contracts import UserError
from avion_dali.models.torch_files import Inert, find_state_dict, read_torch_file

STATE = OrderedDict(
    {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.turned": torch.arange(6.0).reshape(2, 3).t(),
        "b.half": torch.arange(4).half(),
        "b.bfloat16": torch.arange(3).bfloat16(),
        "c.number": torch.tensor(7),
        "c.empty": torch.zeros(0, 4),
        "d.parameter": torch.nn.Parameter(torch.ones(2)),
    }
)


class Hyper:
    """A class that only the program that wrote the checkpoint has."""

    def __init__(self) -> None:
        self.depth = 12


@pytest.fixture
def frame(monkeypatch) -> object:
    """An object that pickles as a pandas DataFrame does: by classes and a function that are gone later."""
    manager_type = type("BlockManager", (), {"__module__": "pandas.core.internals.managers"})
    frame_type = type("DataFrame", (), {"__module__": "pandas.core.frame"})

    def _unpickle_block() -> None: ...

    _unpickle_block.__module__, _unpickle_block.__qualname__ = "pandas._libs.internals", "_unpickle_block"
    for package in ("pandas", "pandas.core", "pandas.core.internals", "pandas._libs"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for made in (manager_type, frame_type, _unpickle_block):
        module = types.ModuleType(made.__module__)
        setattr(module, made.__name__, made)
        monkeypatch.setitem(sys.modules, made.__module__, module)
    frame, manager = frame_type(), manager_type()
    manager.blocks = (Asks(_unpickle_block, np.arange(3), slice(0, 1)), np.array(["a"], dtype=object))
    frame._mgr, frame.saved = manager, datetime.date(2023, 9, 1)
    return frame


class Asks:
    """Asks to call something when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def save(path: Path, content: object, *, legacy: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same_state(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


def change_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes of the pickle inside a file, checksums right."""
    if not zipfile.is_zipfile(path):
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    assert any(old in content for content in entries.values())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.fixture(params=["zip", "legacy"])
def legacy(request) -> bool:
    return request.param == "legacy"


def test_plain_weights(tmp_path, legacy):
    path = save(tmp_path / "w.pt", STATE, legacy=legacy)
    assert same_state(find_state_dict(read_torch_file(path), source="w"))


def test_objects_around_the_weights_are_tolerated(tmp_path, legacy, frame, monkeypatch):
    options = argparse.Namespace(model="CLIP_VITB16", lr=3e-5, frame=frame, hyper=Hyper(), path=Path("x"))
    content = {"epoch": 4, "state_dict": STATE, "args": options, "best_acc1": np.float64(0.5)}
    path = save(tmp_path / "w.pt", content, legacy=legacy)
    monkeypatch.undo()
    read = read_torch_file(path)
    assert same_state(find_state_dict(read, source="w"))
    assert read["epoch"] == 4 and read["args"]["model"] == "CLIP_VITB16" and read["args"]["lr"] == 3e-5
    hyper = read["args"]["hyper"]
    assert isinstance(hyper, Inert) and hyper.origin.endswith(".Hyper") and hyper.state == {"depth": 12}
    assert read["args"]["frame"].origin == "pandas.core.frame.DataFrame"
    assert not isinstance(read["best_acc1"], float)


@pytest.mark.parametrize("place", ["beside", "inside", "deep"])
def test_a_malicious_pickle_is_named_and_not_executed(tmp_path, legacy, place):
    witness = tmp_path / "executed"
    attack = Asks(os.system, f"touch {witness}")
    content = {
        "beside": {"state_dict": STATE, "args": attack},
        "inside": {"state_dict": {**STATE, "x": attack}},
        "deep": {"state_dict": STATE, "args": argparse.Namespace(hyper=[OrderedDict(x=attack)])},
    }[place]
    path = save(tmp_path / "w.pt", content, legacy=legacy)
    with pytest.raises(
        UserError, match=rf"requests a call of {os.system.__module__}\.system, which is not allowed"
    ):
        read_torch_file(path)
    assert not witness.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, open, np.load, pickle.loads, torch.load])
def test_functions_are_refused_by_name(tmp_path, legacy, function):
    path = save(tmp_path / "w.pt", {"state_dict": STATE, "args": Asks(function, "x")}, legacy=legacy)
    with pytest.raises(UserError, match=rf"requests a call of [\w.]*{function.__name__}, which is not allowed"):
        read_torch_file(path)


def hand_written(opcodes: bytes) -> bytes:
    """A torch zip whose pickle is these opcodes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch WITNESS'\ntR.",  # REDUCE
        b"(S'touch WITNESS'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch WITNESS'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch WITNESS\x85R.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\nX\x0d\x00\x00\x00touch WITNESS\x85\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\n\x8c\x0dtouch WITNESS\x85}\x92.",  # NEWOBJ_EX
        b"ccollections\nOrderedDict\n)R(cos\nsystem\nS'touch WITNESS'\ntb.",  # BUILD
    ],
)
def test_no_opcode_executes(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    path.write_bytes(hand_written(opcodes))
    with pytest.raises(UserError):
        find_state_dict(read_torch_file(path), source="w")
    assert not (tmp_path / "WITNESS").exists()


def test_an_object_in_the_state_dict_is_named(tmp_path, legacy):
    path = save(tmp_path / "w.pt", {"state_dict": {**STATE, "x": Hyper()}}, legacy=legacy)
    with pytest.raises(UserError, match=r"'x' in its state dict is a .*\.Hyper, not a tensor"):
        find_state_dict(read_torch_file(path), source="w")


def test_the_state_dict_is_the_first_of_its_names():
    tensor = {"x": torch.zeros(1)}
    for name in ("model", "module", "state_dict"):
        assert list(find_state_dict({"args": {}, name: tensor}, source="w")) == ["x"]
    assert list(find_state_dict({"state_dict": {"y": torch.zeros(1)}, "model": tensor}, source="w")) == ["x"]
    for content in ([1], {}, {"model": {}}, 3, {"epoch": 3}):
        with pytest.raises(UserError, match="contains no weights"):
            find_state_dict(content, source="w")


def test_parameters_of_a_torchscript_archive(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.LayerNorm(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.zeros(1, 3)).save(tmp_path / "w.pt")
    state = find_state_dict(read_torch_file(tmp_path / "w.pt"), source="w")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_cut_short_anywhere_is_an_error(tmp_path, legacy):
    content = {"state_dict": STATE, "args": argparse.Namespace(a=1, hyper=Hyper())}
    path = save(tmp_path / "w.pt", content, legacy=legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cannot be read as weights"):
            read_torch_file(path)


def test_flipped_bytes_are_errors_or_other_weights(tmp_path, legacy):
    """Old files have no checksums: what counts is that nothing but a UserError comes out."""
    content = {"state_dict": dict(STATE), "args": argparse.Namespace(a=1, hyper=Hyper())}
    path = save(tmp_path / "w.pt", content, legacy=legacy)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            find_state_dict(read_torch_file(path), source="w")
        except UserError:
            refused += 1
    assert refused > 30


def test_tensors_stay_inside_their_storage(tmp_path, legacy):
    """A tensor that claims more than its storage holds must not read beyond it."""
    numbers = torch.arange(77, dtype=torch.float32)
    content = {"state_dict": {"x": numbers}, "args": argparse.Namespace()}
    path = save(tmp_path / "w.pt", content, legacy=legacy)
    change_pickle(path, b"K\x00KM\x85", b"K\x00K\xff\x85")  # offset 0, size (77,) to (255,)
    with pytest.raises(UserError, match="out of bounds"):
        read_torch_file(path)


def test_a_storage_longer_than_the_file_is_not_allocated(tmp_path):
    path = tmp_path / "w.pt"
    save(path, {"state_dict": {"x": torch.zeros(70_000)}, "args": argparse.Namespace()}, legacy=True)
    huge = struct.pack("<i", 0x7FFFFFFF)
    path.write_bytes(path.read_bytes().replace(b"J" + struct.pack("<i", 70_000), b"J" + huge))
    with pytest.raises(UserError, match="longer than the file"):
        read_torch_file(path)


def test_compressed_entries_are_read(tmp_path):
    path = save(tmp_path / "w.pt", {"state_dict": STATE, "args": argparse.Namespace()}, legacy=False)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert same_state(find_state_dict(read_torch_file(path), source="w"))


def test_other_files_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_torch_file(tmp_path / "absent.pt")
    for content in (b"", b"hello", pickle.dumps({"x": 1})):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"w\.pt cannot be read as weights"):
            read_torch_file(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("photo.jpg", b"1")
    with pytest.raises(UserError, match="holds no data.pkl"):
        read_torch_file(tmp_path / "w.pt")
