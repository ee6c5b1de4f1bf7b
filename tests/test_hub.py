"""A model folder is written whole or not at all, and read exactly or refused with the reason."""

import hashlib
import json
import os
import stat
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from equizoo import hub
from equizoo.hub import check_keys, join_front_matter, load_folder, save_folder, split_front_matter

ARRAYS = {
    "layers.0.kernel": np.arange(6.0).reshape(2, 3),
    "half": np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16),
    "scalar": np.array(2.5, dtype=np.float32),
    "large": np.array([2**40 + 1], dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.int8),
    "mask": np.array([True, False]),
}
GOLDEN = {"energy": np.array([-17660.123456789])}
CONFIG = {"architecture": "mace", "format": 1, "title": "Å", "cutoff": 5.0}


def save(path, **changes):
    contents = {"config": CONFIG, "arrays": ARRAYS, "golden": GOLDEN, "card": "---\na: 1\n---\n"}
    return save_folder(path, **(contents | changes))


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype, key
        assert found[key].shape == expected[key].shape, key
        assert found[key].tobytes() == np.asarray(expected[key], order="C").tobytes(), key


def test_a_folder_comes_back_exactly(tmp_path):
    sha256 = save(tmp_path / "deep" / "model")
    folder = load_folder(tmp_path / "deep" / "model", expected_sha256=sha256)
    assert folder.config == CONFIG
    assert folder.card == "---\na: 1\n---\n"
    assert_identical(folder.arrays, ARRAYS)
    assert_identical(folder.golden, GOLDEN)
    written = (tmp_path / "deep" / "model" / "model.safetensors").read_bytes()
    assert folder.sha256 == sha256 == hashlib.sha256(written).hexdigest()


def test_views_and_foreign_byte_order_are_written_as_they_look(tmp_path):
    grid = np.arange(6.0).reshape(2, 3)
    views = {"transposed": grid.T, "strided": grid[:, ::2], "reversed": grid[::-1]}
    save(tmp_path / "model", arrays=views | {"big": grid.astype(">f8")}, golden={"t": grid.T})
    folder = load_folder(tmp_path / "model")
    for key, array in views.items():
        np.testing.assert_array_equal(folder.arrays[key], array)
    np.testing.assert_array_equal(folder.arrays["big"], grid)
    np.testing.assert_array_equal(folder.golden["t"], grid.T)


def test_the_callers_arrays_are_left_alone_and_their_order_does_not_matter(tmp_path):
    view = np.arange(6.0).reshape(2, 3).T
    arrays = {"b": view, "a": np.ones(2)}
    first = save(tmp_path / "one", arrays=arrays)
    assert arrays["b"] is view and list(arrays) == ["b", "a"]
    assert save(tmp_path / "two", arrays={"a": np.ones(2), "b": view}) == first


def test_arrays_own_their_memory_when_the_file_is_replaced(tmp_path):
    save(tmp_path / "model")
    folder = load_folder(tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / "model" / "model.safetensors")))
    assert_identical(folder.arrays, ARRAYS)


def test_files_have_the_permissions_of_the_users_umask(tmp_path):
    save(tmp_path / "model")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "model") == mode(tmp_path / "plain")
    files = list((tmp_path / "model").iterdir())
    assert len(files) == 4
    assert {mode(file) for file in files} == {mode(tmp_path / "plain" / "file")}


def test_nothing_is_overwritten(tmp_path):
    save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists and is not an empty folder.*choose another name"):
        save(tmp_path / "model", arrays={})
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        save(tmp_path / "file")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "file").read_text() == "kept"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    assert load_folder(tmp_path / "model").config == CONFIG


@pytest.mark.parametrize("exception", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write_bytes", "rename"])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, exception, step):
    write, calls = Path.write_bytes, []

    def fail_on_second(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise exception
        return write(path, content)

    def fail(*args):
        raise exception

    if step == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", fail_on_second)
    else:
        monkeypatch.setattr(hub.os, "rename", fail)
    with pytest.raises(type(exception)):
        save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_would_not_survive_are_refused(tmp_path):
    bad = {"f8": np.zeros(2, ml_dtypes.float8_e4m3fn), "object": np.array([{}]), "ok": np.ones(1)}
    with pytest.raises(
        ValueError, match=r"model.safetensors cannot hold f8 \(float8_e4m3fn\), object"
    ):
        save(tmp_path / "model", arrays=bad)
    with pytest.raises(ValueError, match=r"golden.safetensors cannot hold z \(complex128\)"):
        save(tmp_path / "model", golden={"z": np.zeros(1, complex)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "model", config={"cutoff": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_optional_and_the_rest_is_not(tmp_path):
    save(tmp_path / "model", card=None)
    assert load_folder(tmp_path / "model").card is None
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "golden.safetensors").unlink()
    message = r"lacks config.json, golden.safetensors; expected .*, found model.safetensors\.$"
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path / "model")
    with pytest.raises(
        ValueError, match="nowhere is not a folder; expected one holding config.json"
    ):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors"])
def test_truncated_arrays_are_refused(tmp_path, keep, name):
    save(tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name} is truncated or not a safetensors file"):
        load_folder(tmp_path / "model")


def test_altered_weights_are_refused_when_the_sha256_is_known(tmp_path):
    sha256 = save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    assert load_folder(tmp_path / "model").sha256 == found
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, expected {sha256}"):
        load_folder(tmp_path / "model", expected_sha256=sha256)


@pytest.mark.parametrize("text", ["{", "[1]", '{"cutoff": Infinity}'])
def test_a_broken_config_is_refused_by_path(tmp_path, text):
    save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"model/config\.json (is not valid JSON|holds a JSON list)"
    ):
        load_folder(tmp_path / "model")


@pytest.mark.parametrize("suffix", sorted(hub.REFUSED))
def test_pickles_are_no_source_of_weights(tmp_path, suffix):
    (tmp_path / f"weights{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"weights\{suffix} may run code.*equizoo convert"):
        load_folder(tmp_path / f"weights{suffix}")
    with pytest.raises(ValueError, match=rf"lacks .*weights\{suffix} may run code"):
        load_folder(tmp_path)


def test_a_pickle_beside_the_weights_is_ignored(tmp_path):
    save(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"never read")
    assert_identical(load_folder(tmp_path / "model").arrays, ARRAYS)


def test_all_wrong_keys_are_listed_at_once():
    found = {"a": (2, 3), "b": (), "extra.kernel": (4,)}
    check_keys(found, dict(found))
    with pytest.raises(ValueError) as error:
        check_keys(found, {"a": (3, 2), "b": (), "lost.bias": (1,), "lost.kernel": (5,)})
    assert str(error.value).splitlines()[1:] == [
        "  missing lost.bias (1,)",
        "  missing lost.kernel (5,)",
        "  unexpected extra.kernel (4,)",
        "  a has shape (2, 3), expected (3, 2)",
    ]


FIELDS = st.dictionaries(
    st.text("abc_é", min_size=1),
    st.none() | st.booleans() | st.integers() | st.lists(st.text("abNo1: #-'\"\n{}é")),
)


@hypothesis.given(FIELDS, st.text())
def test_front_matter_and_body_come_back(fields, body):
    assert split_front_matter(join_front_matter(fields, body)) == (fields, body)


def test_front_matter_keeps_order_and_ends_at_the_first_rule():
    card = join_front_matter({"name": "x", "cutoff": 5.0, "also": None}, "Text\n---\nmore\n")
    assert card == "---\nname: x\ncutoff: 5.0\nalso: null\n---\nText\n---\nmore\n"
    assert split_front_matter(card)[1] == "Text\n---\nmore\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Title\n", "x.md has no front matter; expected YAML between two '---' lines"),
        ("---\na: 1\n", "x.md has no front matter"),
        ("---\na: [1\n---\n", r"x\.md has front matter that is not valid YAML(.|\n)*line"),
        (
            "---\njust words\n---\n",
            "x.md has front matter 'just words'; expected 'key: value' lines",
        ),
        ("---\na: !!python/name:os.system\n---\n", "not valid YAML"),
    ],
)
def test_cards_without_proper_front_matter_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        split_front_matter(text, where="x.md")


def test_safetensors_still_needs_our_copy():
    """The trap that save_folder avoids; when this fails, its copy can go."""
    view = np.arange(6.0).reshape(2, 3).T
    assert (safetensors.numpy.load(safetensors.numpy.save({"v": view}))["v"] != view).any()


def test_config_is_readable_json(tmp_path):
    save(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == CONFIG
    assert text.startswith('{\n  "architecture": "mace",\n') and '"Å"' in text
