"""Weights in one file or several: each tensor once, damage and trickery named in one line."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sora_jax.convert.tensors import write_shards
from sora_jax.convert.weights import open_weights


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def shards(tmp_path):
    """Two files and their index."""
    tensors = {"a.weight": values(4, 3), "b.weight": values(2, seed=1), "c.bias": values(5, seed=2)}
    parts = {
        "model-1-of-2.safetensors": ["a.weight"],
        "model-2-of-2.safetensors": list(tensors)[1:],
    }
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    table = {key: name for name, keys in parts.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 76}, "weight_map": table}))
    return tmp_path, index, table, tensors


def write_index(index, table):
    index.write_text(json.dumps({"weight_map": table}))


def refused(path, words):
    with pytest.raises(ValueError, match=words) as error:
        weights = open_weights(path)
        for key in weights.shapes:
            weights.read(key)
    assert "\n" not in str(error.value)


def test_shards_are_read_as_one(shards):
    folder, index, _, tensors = shards
    for path in (folder, index):
        weights = open_weights(path)
        assert weights.shapes == {key: value.shape for key, value in tensors.items()}
        for key, value in tensors.items():
            np.testing.assert_array_equal(weights.read(key), value)


def test_an_index_cannot_leave_its_folder(shards):
    folder, index, table, _ = shards
    secret = folder.parent / "outside.safetensors"
    save_file({"a.weight": values(4, 3)}, secret)
    for name in ("../outside.safetensors", str(secret), "sub/x.safetensors", "..", ""):
        write_index(index, table | {"a.weight": name})
        refused(folder, "not in its own folder")


def test_files_of_two_exports_are_told(shards):
    folder, index, table, _ = shards
    write_index(index, table | {"d.weight": "model-1-of-2.safetensors"})
    refused(folder, r"model-1-of-2.safetensors: lacks tensor 'd.weight'")
    write_index(index, {k: v for k, v in table.items() if k != "c.bias"})
    refused(folder, "does not list 1 tensors that its files hold, 'c.bias'")
    write_index(index, table | {"b.weight": "model-3-of-3.safetensors"})
    refused(folder, "model-3-of-3.safetensors: no such file")
    write_index(index, table)
    save_file({"a.weight": values(4, 3), "c.bias": values(5)}, folder / "model-1-of-2.safetensors")
    refused(folder, "tensor 'c.bias' is in model-1-of-2.safetensors and in model-2-of-2")


def test_a_damaged_index_is_told(shards):
    folder, index, _, _ = shards
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        refused(folder, "index of safetensors files|weight_map must give")


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "pytorch_model.bin", "model.ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    for path in (tmp_path / name, tmp_path):
        refused(path, "pickled files are refused, because reading one runs whatever code it holds")


def test_truncated_files_and_lying_headers_are_told(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": values(64)}, path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    lying = whole.replace(b'"shape":[64]', b'"shape":[65]')
    assert lying != whole
    damaged = {
        "truncated": whole[:-4],
        "empty": b"",
        "header too long": (1 << 40).to_bytes(8, "little") + whole[8:],
        "shape": lying,
        "not JSON": whole[:8] + b"x" * size + whole[8 + size :],
    }
    for data in damaged.values():
        path.write_bytes(data)
        refused(path, f"{path}: damaged safetensors file")


def test_an_unknown_element_type_names_the_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, np.uint32)}, path)
    refused(path, "tensor 'a' has elements U32; read are F64, F32")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "not a .safetensors file")
    refused(tmp_path / "modle.gguf", "no such file; did you mean model.gguf")
    refused(tmp_path / "nope.safetensors", "no such file; check its name and its folder")
    refused(tmp_path / "no" / "a.safetensors", "and no folder .*no; check the path")
    refused(tmp_path, "needs one .safetensors file, or one index of several; found: none")


def raw_file(path, tensors: dict[str, tuple[str, np.ndarray]]):
    """A safetensors file written by the format's description: numpy's writer has no float8."""
    header, data = {}, b""
    for key, (dtype, value) in tensors.items():
        end = len(data) + value.nbytes
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), end]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("rows", [1, 4])
def test_eight_bit_tensors_are_read_with_their_scale(tmp_path, rows):
    weight = values(4, 3)
    scale = np.linspace(0.5, 1, rows, dtype=np.float32)
    stored = (weight / scale[:, None]).astype(ml_dtypes.float8_e4m3fn)
    raw_file(
        tmp_path / "model.safetensors",
        {
            "a.weight": ("F8_E4M3", stored),
            "a.scale_weight": ("F32", scale if rows > 1 else scale.reshape(())),
            "a.scale_input": ("F32", np.ones((), np.float32)),
            "a.bias": ("BF16", values(4).astype(ml_dtypes.bfloat16)),
            "scaled_fp8": ("F8_E4M3", np.zeros(2, ml_dtypes.float8_e4m3fn)),
            "spiece_model": ("U8", np.zeros(9, np.uint8)),  # ComfyUI's tokenizer
        },
    )
    weights = open_weights(tmp_path)
    assert set(weights.shapes) == {"a.weight", "a.bias"}
    read = weights.read("a.weight")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, stored.astype(np.float32) * scale[:, None])
    np.testing.assert_allclose(read, weight, rtol=0.07, atol=0.01)  # three bits of mantissa
    assert weights.read("a.bias").dtype == ml_dtypes.bfloat16


def test_a_scale_without_its_tensor_is_told(tmp_path):
    eights = np.zeros((8, 4), ml_dtypes.float8_e4m3fn)
    table = {"a.weight": ("F8_E4M3", eights), "a.scale_weight": ("F32", np.ones((8, 2), "f"))}
    raw_file(tmp_path / "m.safetensors", table)
    with pytest.raises(ValueError, match=r"m.safetensors: 'a.scale_weight' has shape \(8, 2\)"):
        open_weights(tmp_path / "m.safetensors")
    raw_file(tmp_path / "m.safetensors", {"a.scale_weight": ("F32", np.ones((), np.float32))})
    refused(tmp_path, "'a.weight' has a scale but no tensor")


def test_a_file_is_in_memory_once_while_it_is_written(tmp_path):
    shapes, alive = {f"t{i}": (4,) for i in range(4)}, []

    def read(key):
        value = np.ones(4, np.float32)
        alive.append(weakref.ref(value))
        assert [reference() is not None for reference in alive].count(True) == 1  # this one
        return value

    write_shards(tmp_path, "m", shapes, read, dtype="bfloat16")
    assert open_weights(tmp_path / "m.safetensors").read("t3").tolist() == [1, 1, 1, 1]


def test_a_full_disk_is_told_by_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("sora_jax.convert.tensors.save_file", full)
    with pytest.raises(ValueError, match=r"m.safetensors: not written \(No space left.*make room"):
        write_shards(tmp_path, "m", {"a": (1,)}, lambda key: np.ones(1, np.float32))
    assert not list(tmp_path.iterdir())
