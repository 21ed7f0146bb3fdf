"""Safetensors files in flat memory: the library reads ours, we read the library's, and what is unsound is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load as library_load
from safetensors.numpy import save as library_save

from shared_models.errors import WeightsInvalid
from shared_models.files import file_sha256
from shared_models.weights import (
    BLOCK,
    Arrays,
    Spec,
    difference,
    load,
    open_tensors,
    save,
    save_arrays,
    schema_of,
    schema_sha256,
)

TENSORS: Arrays = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([7], np.int64),
    "c": np.zeros((0, 4), np.float16),
}
some = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.uint8]).flatmap(
        lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(some)
def test_ours_and_the_library_read_each_other(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("w")
    tensors = {n: a for n, a in tensors.items() if n != "__metadata__"}
    save_arrays(folder / "ours", tensors)
    (folder / "theirs").write_bytes(library_save({n: np.asarray(a, order="C") for n, a in tensors.items()}))
    for back in (library_load((folder / "ours").read_bytes()), load(folder / "theirs"), load(folder / "ours")):
        assert back.keys() == tensors.keys()
        for name, array in tensors.items():
            assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
            assert back[name].tobytes() == array.tobytes()


def test_equal_content_has_equal_bytes_in_whatever_order_it_is_given(tmp_path):
    one = save(tmp_path / "one", schema_of(TENSORS), iter(TENSORS.items()))
    two = save(tmp_path / "two", schema_of(TENSORS), iter(sorted(TENSORS.items(), reverse=True)))
    assert one == two == file_sha256(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_tensor_is_read_in_blocks_that_make_it_up(tmp_path):
    big = np.arange(2 * BLOCK + 5, dtype=np.float32)
    save_arrays(tmp_path / "big", {"w": big})
    blocks = list(open_tensors(tmp_path / "big", "here").blocks("w"))
    assert [b.size for b in blocks] == [BLOCK, BLOCK, 5]
    assert np.concatenate(blocks).tobytes() == big.tobytes()


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    save_arrays(tmp_path / "w", TENSORS)
    before = (tmp_path / "w").read_bytes()
    with pytest.raises(WeightsInvalid, match="not given"):
        save(tmp_path / "w", schema_of(TENSORS), iter({"a": TENSORS["a"]}.items()))
    with pytest.raises(WeightsInvalid, match=r"has shape \[3\], the model has \[2, 3\]"):
        save(tmp_path / "w", schema_of(TENSORS), iter({"b": np.zeros(3, np.float32)}.items()))
    assert (tmp_path / "w").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def header(entries: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        (10**12).to_bytes(8, "little") + b"{}",
        header([]),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        header({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}),
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}),
        header({"w": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4 * 10**18]}}),
        header({"w": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]}}),
        header({"w": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}),
        header({"w": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}),
        header({"w": {"dtype": "F32", "shape": [9e999], "data_offsets": [0, 8]}}),
    ],
)
def test_an_unsound_file_is_refused(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(WeightsInvalid, match="not a sound safetensors file"):
        open_tensors(tmp_path / "w", "here")


def test_every_truncation_and_any_extra_byte_is_refused(tmp_path):
    save_arrays(tmp_path / "w", TENSORS)
    whole = (tmp_path / "w").read_bytes()
    for cut in (*(whole[:n] for n in range(len(whole))), whole + b"\0"):
        (tmp_path / "w").write_bytes(cut)
        with pytest.raises(WeightsInvalid):
            load(tmp_path / "w")


def test_a_file_that_is_cut_while_it_is_read_is_noticed(tmp_path):
    save_arrays(tmp_path / "w", TENSORS)
    opened = open_tensors(tmp_path / "w", "here")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-4])
    with pytest.raises(WeightsInvalid, match="ends within 'b'"):
        list(opened.blocks("b"))


def test_a_difference_names_the_tensor_and_both_sides():
    schema = schema_of(TENSORS)
    assert difference(schema, schema) is None
    assert difference(schema, {**schema, "x": schema["a"]}) == "tensor 'x' is not in the model"
    assert difference(schema, {"a": schema["a"], "b": schema["b"]}) == "tensor 'c' is missing"
    wrong = {**schema, "a": Spec((1,), np.dtype(np.int32))}
    assert difference(schema, wrong) == "'a' is int32, the model has int64"


def test_the_schema_digest_tells_architectures_apart():
    schema = schema_of(TENSORS)
    assert schema_sha256(schema) == schema_sha256(dict(reversed(list(schema.items()))))
    assert schema_sha256(schema) != schema_sha256({**schema, "a": Spec((2,), np.dtype(np.int64))})
