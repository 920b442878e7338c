"""Annotation and weight files made to hang, exhaust or confuse their reader end in one message, soon."""

import io
import json
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_dual_encoder

from avion_dali import time_limit
from avion_dali.contracts import UserError
from avion_dali.datasets.captions import annotation_rows
from avion_dali.datasets.ego4d import Narrations
from avion_dali.datasets.epic_files import _annotation_row
from avion_dali.datasets.unpickling import load_pickle
from avion_dali.engine import checkpoint
from avion_dali.engine.checkpoint import export_safetensors
from avion_dali.models.starting_weights import open_start
from avion_dali.models.torch_files import find_state_dict, read_torch_file
from avion_dali.wording import shown

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 20


def bomb(kind: type, depth: int = 60) -> Any:
    """A value that is written in a few bytes and has 2^depth parts."""
    value: Any = kind()
    for _ in range(depth):
        value = kind((value, value))
    return value


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def pickled_deep(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


ROWS = {
    "memo-bomb": bomb(list),
    "bomb-in-row": ("v", bomb(list), 1.0, "x"),
    "bomb-as-video": (bomb(tuple), 0.0, 1.0, "x"),
    "bomb-as-text": ("v", 0.0, 1.0, bomb(list)),
    "cycle": cycle(),
    "digits": ("v", 10**5_000, 10**5_001, "x"),
    "digits-as-text": ("v", 0.0, 1.0, 10**6_000),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_narrations_are_rejected_with_a_short_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([ROWS[name], ("v", 0.0, 1.0, "good")]))
    bad, good = Narrations([tmp_path / "a.pkl"])
    assert len(bad.reason) < 200
    assert good.texts == ("good",)


def test_deep_narrations_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickled_deep(200_000))
    (row,) = Narrations([tmp_path / "a.pkl"])
    assert len(row.reason) < 200


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"video": ' + "[" * 200_000, '{"video": "v", "start": ' + "9" * 5_000 + ', "end": 1}'],
    ids=["deep", "deep-field", "digits"],
)
def test_lines_that_json_cannot_hold_are_one_message(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        list(annotation_rows(tmp_path / "a.jsonl", None))


def test_nested_fields_are_rejected_with_a_short_reason(tmp_path: Path) -> None:
    row = {"video": nested(500), "start": 0, "end": 1, "text": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (rejected,) = annotation_rows(tmp_path / "a.jsonl", None)
    assert len(rejected.reason) < 200


def test_class_numbers_of_thousands_of_digits_are_rejected() -> None:
    fields = ["id", "P01", "P01_01", "0", "00:00:00.00", "00:00:01.00", "0", "1", "cut", "cut", "1", "x", "1"]
    for column in range(len(fields)):
        for digits in ("9" * 5_000, "[" + "9" * 5_000 + "]"):
            _annotation_row(1, [*fields[:column], digits, *fields[column + 1 :], "[1]"])


def test_a_pickle_that_never_ends_is_ended(tmp_path: Path) -> None:
    """A dictionary's key is hashed in compiled code, where no signal handler of Python has a turn."""
    (tmp_path / "a.pkl").write_bytes(endless_key())
    script = (
        "import sys; from pathlib import Path; from avion_dali import time_limit; time_limit.BASE_S = 0.5;"
        "from avion_dali.datasets.unpickling import load_pickle; load_pickle(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.pkl")], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == -9
    assert done.stderr.decode() == (
        f"error: {tmp_path / 'a.pkl'} takes too long to read: it is damaged, or not to be trusted\n"
    )


def endless_key() -> bytes:
    pairs = b"".join(b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    return b"\x80\x02}" + b")q\x00" + pairs + b"K\x01s."


def test_the_watch_does_not_disturb_sound_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "BASE_S", 0.4)
    (tmp_path / "a").touch()
    with time_limit.bounded_time(tmp_path / "a"):
        time.sleep(1)  # a slow disk
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    assert load_pickle(tmp_path / "a.pkl") == [1]


def torch_zip(path: Path, data: bytes, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", b"3\n")
        for name, content in more.items():
            archive.writestr(f"a/{name}.pkl", content)
    return path


PERSISTENT = {
    "no-tuple": b"\x80\x02K\x07Q.",
    "bomb": b"\x80\x02)" + b"q\x000h\x00h\x00\x86" * 50 + b"Q.",
    "text": b"\x80\x02X\x03\x00\x00\x00abcQ.",
    "short": b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",
}


@pytest.mark.parametrize("name", PERSISTENT)
@pytest.mark.parametrize("more", [{}, {"constants": b"\x80\x02N."}], ids=["torch.save", "torchscript"])
def test_outside_references_of_any_kind_are_one_message(tmp_path: Path, name: str, more: dict) -> None:
    path = torch_zip(tmp_path / "w.pt", PERSISTENT[name], **more)
    with pytest.raises(UserError, match="cannot be read as weights"):
        find_state_dict(read_torch_file(path), source=str(path))


def test_texts_of_gigabytes_in_a_small_archive_are_not_unpacked(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "w.pt", b"\x80\x02N.", constants=bytes(300 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="unpacks to"):
        read_torch_file(path)


def module_pickle(*, cyclic: bool) -> bytes:
    """A TorchScript archive's module in which every module holds the next one twice, or itself."""
    new = b"c__torch__\nM\n)\x81"
    if cyclic:
        return b"\x80\x02" + new + b"q\x00}(X\x01\x00\x00\x00ah\x00ub."
    built = new + b"}b"
    for number in range(60):
        memo = b"q" + bytes([number])
        built += memo + b"0" + new + b"}(X\x01\x00\x00\x00ah" + bytes([number])
        built += b"X\x01\x00\x00\x00bh" + bytes([number]) + b"ub"
    return b"\x80\x02" + built + b"."


@pytest.mark.parametrize("cyclic", [True, False])
def test_graphs_of_modules_without_end_are_one_message(tmp_path: Path, cyclic: bool) -> None:
    path = torch_zip(tmp_path / "w.pt", module_pickle(cyclic=cyclic), constants=b"\x80\x02N.")
    with pytest.raises(UserError, match="endlessly nested modules"):
        find_state_dict(read_torch_file(path), source=str(path))


@pytest.mark.parametrize(
    "content", [bomb(list), cycle(), {"model": bomb(list)}, {"model": {bomb(tuple, 20): 1}}]
)
def test_contents_that_are_no_weights_are_one_message(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no weights|not a tensor"):
        open_start(str(tmp_path / "w.pt"))


def test_views_larger_than_their_storage_are_refused(tmp_path: Path) -> None:
    state = {"visual.patch_embed.weight": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match="claims more numbers"):
        open_start(str(tmp_path / "w.pt"))


CONFIG = {"model": {"encoder": "vit", "size": "tiny"}, "data": {}, "objective": {"name": "contrastive"}}
WRONG_HEADERS = {
    "config is a list": {"config": [1]},
    "config is text": {"config": "x"},
    "sections are no objects": {"config": {**CONFIG, "model": 3}},
    "data is null": {"config": {**CONFIG, "data": None}},
    "objective is a list": {"config": {**CONFIG, "objective": ["contrastive"]}},
    "size is a number": {"config": {**CONFIG, "model": {"size": 3}}},
    "size is unknown": {"config": {**CONFIG, "model": {"size": "huge"}}},
    "size is a list": {"config": {**CONFIG, "model": {"size": ["tiny"]}}},
    "encoder is an object": {"config": {**CONFIG, "model": {"encoder": {}}}},
    "encoder is unknown": {"config": {**CONFIG, "model": {"encoder": "x"}}},
    "a billion frames": {"config": {**CONFIG, "data": {"num_frames": 10**9}}},
    "a million frames": {"config": {**CONFIG, "data": {"num_frames": 10**6}}},
    "frames as text": {"config": {**CONFIG, "data": {"num_frames": "4"}}},
    "negative frames": {"config": {**CONFIG, "data": {"num_frames": -4}}},
    "a wide space": {"config": {**CONFIG, "model": {"embed_dim": 10**9}}},
    "digits": {"config": {**CONFIG, "model": {"embed_dim": 10**4_000}}},
    "nan": {"config": {**CONFIG, "model": {"norm_eps": float("nan")}}},
    "true frames": {"config": {**CONFIG, "data": {"num_frames": True}}},
    "weights are a list": {"weights": [1]},
    "classes are a number": {"config": CONFIG, "classes": 3},
    "classes are numbers": {"config": CONFIG, "classes": [1, 2]},
    "facts as text": {"weights": {"width": "x"}},
    "a billion classes": {"weights": {"num_classes": 10**9}},
    "layout without facts": {"layout": "avion-plain", "weights": 3},
    "odd activation": {"config": {**CONFIG, "model": {"activation": ["gelu"]}}},
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_headers_are_checked_as_configurations_are(tmp_path: Path, name: str) -> None:
    export_safetensors(small_dual_encoder(), tmp_path / "w.safetensors", header=WRONG_HEADERS[name])
    with pytest.raises(UserError, match=r"w\.safetensors"):
        open_start(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, "[]", "3", "{", '"x"'])
def test_headers_that_are_no_objects_are_one_message(tmp_path: Path, text: str) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"avion_dali": text})
    with pytest.raises(UserError, match=r"w\.safetensors"):
        open_start(str(tmp_path / "w.safetensors"))


WRONG_CHECKPOINTS = {
    "version": {"format_version": "x"},
    "no version": {"format_version": None},
    "step": {"step": "7"},
    "model": {"model": [1]},
    "order": {"order": 3},
    "classes": {"classes": [1, 2]},
    "config": {"config": "x"},
    "best": {"best_metric": "high"},
    "average": {"average": 7},
}


@pytest.mark.parametrize("name", WRONG_CHECKPOINTS)
def test_checkpoints_with_values_of_other_types_are_one_message(tmp_path: Path, name: str) -> None:
    whole = {"model": {}, "optimizer": {}, "scaler": {}, "step": 3, "order": {}}
    path = tmp_path / "checkpoint.pt"
    head = {"format": checkpoint.FORMAT, "format_version": checkpoint.FORMAT_VERSION}
    torch.save({**head, **whole}, path)
    assert checkpoint.load_checkpoint(path).step == 3
    torch.save({**head, **whole, **WRONG_CHECKPOINTS[name]}, path)
    with pytest.raises(UserError, match="damaged, use another"):
        checkpoint.load_checkpoint(path)


def test_values_are_shown_short_and_escaped() -> None:
    assert shown("a\x1b[31m") == r"'a\x1b[31m'"
    for value in (bomb(list), cycle(), nested(5_000), 10**5_000, "x" * 10**6, io.BytesIO(), {1: bomb(tuple)}):
        assert len(shown(value)) <= 60
