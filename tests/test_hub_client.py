"""The real client of the Hugging Face Hub against a Hub on the loopback, and without any Hub."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import TOKEN
from huggingface_hub import constants

from equizoo.hub import CARD, REQUIRED, WEIGHTS, load_folder, save_folder
from equizoo.hub_client import HubAccess, MissingFile, download_folder, upload_files

CONFIG = {"architecture": "mace", "format": 1, "cutoff": 5.0}
ARRAYS = {"kernel": np.arange(6.0).reshape(2, 3).T, "bias": np.ones(3, np.float32)}
TEXT = "---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_folder(tmp_path / "model", config=CONFIG, arrays=ARRAYS, golden={}, card=TEXT)
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def paths(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in folder.iterdir()}


def push(folder: Path, **options):
    return upload_files("org/model", paths(folder), message="Push", **options)


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# ---- pushing


def test_a_folder_is_pushed_whole_and_comes_back_exactly(hub, folder):
    upload = push(folder, tag="v1", private=True)
    repository = hub.repositories["org/model"]
    assert repository.private and repository.tags == {"v1": upload.commit}
    assert repository.branches["main"] == upload.commit and upload.changed
    assert len(repository.commits) == 2, "one commit beside that of making the repository"
    held = repository.commits[upload.commit]
    assert {name: held[name] for name in contents(folder)} == contents(folder)
    fetched = download_folder("org/model", "v1")
    assert fetched.name == upload.commit
    loaded = load_folder(fetched)
    assert (loaded.config, loaded.card) == (CONFIG, TEXT)
    for key, array in ARRAYS.items():  # one of them is transposed
        np.testing.assert_array_equal(loaded.arrays[key], array)


def test_what_is_there_is_not_sent_again(hub, folder):
    first = push(folder)
    assert len(hub.uploads) == 2
    again = push(folder, tag="v1")
    assert (again.commit, again.changed) == (first.commit, False)
    assert push(folder, tag="v1").commit == first.commit, "a tag that is right may stay"
    assert len(hub.uploads) == 2 and len(hub.repositories["org/model"].commits) == 2
    assert len(hub.asked("POST", "/commit/")) == 1

    changed = upload_files("org/model", paths(folder) | {CARD: b"# Other\n"}, message="Card")
    assert changed.changed and changed.commit != first.commit
    assert len(hub.uploads) == 2
    held = hub.repositories["org/model"].commits[changed.commit]
    assert held[CARD] == b"# Other\n" and held[WEIGHTS] == contents(folder)[WEIGHTS]


def test_a_tag_stays_where_it_is(hub, folder):
    first = push(folder, tag="v1")
    changed = paths(folder) | {CARD: b"# Other\n"}
    with pytest.raises(ValueError, match=f"tag 'v1' already names {first.commit}.*choose another"):
        upload_files("org/model", changed, message="Card", tag="v1")
    assert hub.repositories["org/model"].tags == {"v1": first.commit}


def test_a_stale_parent_writes_nothing(hub, folder):
    first = push(folder)
    second = upload_files(
        "org/model", {CARD: b"# Two\n"}, message="Card", parent_commit=first.commit
    )
    with pytest.raises(ValueError, match="someone has pushed since parent_commit. Nothing was"):
        upload_files("org/model", {CARD: b"# 3\n"}, message="Card", parent_commit=first.commit)
    assert hub.repositories["org/model"].branches["main"] == second.commit
    with pytest.raises(ValueError, match="parent_commit is 'main', expected a full hash"):
        push(folder, parent_commit="main")


def test_another_branch_leaves_main_alone(hub, folder):
    hub.add("org/model", {"old": b""})
    main = hub.repositories["org/model"].branches["main"]
    upload = push(folder, branch="next")
    assert hub.repositories["org/model"].branches == {"main": main, "next": upload.commit}
    assert push(folder, branch="next").commit == upload.commit
    assert download_folder("org/model", "next").name == upload.commit
    with pytest.raises(MissingFile, match="hf-hub:org/model lacks config.json"):
        download_folder("org/model")


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_pushing_needs_a_token_that_may_write(hub, folder, token):
    with pytest.raises(ValueError, match="the Hub refuses.*token that may write.*HF_TOKEN"):
        push(folder, token=token)
    assert hub.repositories == {}


def test_nothing_that_may_run_code_is_uploaded(hub, folder):
    (folder / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.pt may run code.*Nothing was uploaded"):
        push(folder)
    assert hub.log == []


def test_a_hub_out_of_reach_is_said(hub, folder, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(ConnectionError, match="could not be reached.*HF_HUB_OFFLINE"):
        push(folder)


# ---- fetching


def test_a_model_is_fetched_once(hub, folder):
    commit = hub.add("org/model", contents(folder))
    assert download_folder("org/model").name == commit
    got = [request.path.rpartition("/")[2] for request in hub.asked("GET", "/resolve/")]
    assert got == [*REQUIRED, CARD]
    assert all(f"/{commit}/" in request.path for request in hub.asked("GET", "/resolve/"))
    del hub.log[:]
    assert download_folder("org/model", commit).name == commit
    assert [r for r in hub.log if "harness" not in r.path] == [], "a cached commit asks for nothing"
    assert download_folder("org/model").name == commit
    assert hub.asked("GET", "/resolve/") == []


def test_a_push_in_between_does_not_mix_two_commits(hub, folder):
    before = hub.add("org/model", contents(folder))
    other = dict.fromkeys(REQUIRED, b"{}")
    hub.moved["config.json"] = other
    fetched = download_folder("org/model")
    assert fetched.name == before and hub.repositories["org/model"].branches["main"] != before
    assert contents(fetched) == contents(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_content_altered_in_transit_is_fetched_again(hub, folder, name):
    """The client compares sizes alone; a flipped bit is ours to find."""
    hub.add("org/model", contents(folder))
    hub.tamper[name] = 1
    assert contents(download_folder("org/model")) == contents(folder)
    assert len(hub.asked("GET", f"/{name}")) == 2


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_content_that_stays_altered_is_refused_and_not_kept(hub, folder, name, tmp_path):
    commit = hub.add("org/model", contents(folder))
    hub.tamper[name] = 2
    published = "[0-9a-f]{64}" if name == WEIGHTS else "[0-9a-f]{40}"
    message = f"{name} has .*, but was published with {published}, also when fetched again"
    with pytest.raises(ValueError, match=message):
        download_folder("org/model")
    snapshot = tmp_path / "cache/models--org--model/snapshots" / commit
    assert not (snapshot / name).exists()
    assert contents(download_folder("org/model")) == contents(folder)


@pytest.mark.parametrize("damage", ["altered", "truncated", "empty"])
def test_a_damaged_cache_is_repaired(hub, folder, damage):
    hub.add("org/model", contents(folder))
    file = download_folder("org/model") / WEIGHTS
    content = file.read_bytes()
    changed = {"altered": content[:-1] + b"?", "truncated": content[:-9], "empty": b""}[damage]
    file.write_bytes(changed)
    assert contents(download_folder("org/model")) == contents(folder)


def test_a_damaged_cache_without_network_is_refused(hub, folder, monkeypatch):
    hub.add("org/model", contents(folder))
    file = download_folder("org/model") / WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])
    offline(monkeypatch)
    with pytest.raises(ValueError, match="model.safetensors has SHA.*could not be fetched again"):
        download_folder("org/model")


def test_weights_other_than_expected_are_refused(hub, folder):
    """The Hub may say that these are the weights; the registry says which are meant."""
    hub.add("org/model", contents(folder))
    found = hashlib.sha256(contents(folder)[WEIGHTS]).hexdigest()
    assert download_folder("org/model", expected_sha256=found).is_dir()
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, expected {'a' * 64}, also when"):
        download_folder("org/model", expected_sha256="a" * 64)


def test_an_interrupted_download_leaves_nothing_half(hub, folder, tmp_path, monkeypatch):
    hub.add("org/model", contents(folder))
    hub.interrupt[WEIGHTS] = 99
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(ConnectionError, match="not in the cache and could not be fetched"):
        download_folder("org/model")
    blobs = {file.name for file in (tmp_path / "cache").rglob("blobs/*")}
    assert hashlib.sha256(contents(folder)[WEIGHTS]).hexdigest() not in blobs
    hub.interrupt.clear()
    assert contents(download_folder("org/model")) == contents(folder)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, folder):
    hub.add("org/model", contents(folder), private=True)
    hub.redirect = True
    assert contents(download_folder("org/model")) == contents(folder)
    elsewhere = [request for request in hub.log if request.host.startswith("localhost")]
    assert {request.path.rpartition("/")[2] for request in elsewhere} == {
        name for name in contents(folder) if name.endswith(".safetensors")
    }
    assert {request.authorization for request in elsewhere} == {None}
    here = {request.authorization for request in hub.log if request not in elsewhere}
    assert here == {f"Bearer {TOKEN}"}


def test_a_token_given_is_used_and_none_if_so_wished(hub, folder, monkeypatch):
    hub.add("org/model", contents(folder), private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert download_folder("org/model", access=HubAccess(token=TOKEN)).is_dir()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="hf-hub:org/model: no such repository, or a private one"):
        download_folder("org/model", access=HubAccess(token=False))


def test_private_and_gated_repositories_say_what_to_do(hub, folder, monkeypatch):
    hub.add("org/private", contents(folder), private=True)
    hub.add("org/gated", contents(folder), gated=True)
    monkeypatch.delenv("HF_TOKEN")
    for name in ("private", "none"):
        with pytest.raises(ValueError, match=f"hf-hub:org/{name}: no such.*private.*hf auth login"):
            download_folder(f"org/{name}")
    message = "hf-hub:org/gated is gated.*accept their terms.*/org/gated, then run `hf auth login`"
    with pytest.raises(ValueError, match=message):
        download_folder("org/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert contents(download_folder("org/gated")) == contents(folder)


def test_what_the_hub_does_not_have_is_said(hub, folder):
    files = contents(folder)
    hub.add("org/model", files)
    with pytest.raises(ValueError, match="hf-hub:org/model@v9: .*has no such revision 'v9'"):
        download_folder("org/model", "v9")
    del files[CARD]
    hub.add("org/model", files)
    assert load_folder(download_folder("org/model")).card is None
    del files[WEIGHTS]
    hub.add("org/model", files)
    with pytest.raises(MissingFile, match="hf-hub:org/model lacks model.safetensors; expected a"):
        download_folder("org/model")
    with pytest.raises(ValueError, match=r"expected hf-hub:organisation/name\[@revision\]"):
        download_folder("a/b/c")


@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_what_is_cached_needs_no_network(hub, folder, monkeypatch, revision):
    commit = hub.add("org/model", contents(folder))
    fetched = download_folder("org/model")
    (fetched / CARD).unlink()
    offline(monkeypatch)
    revision = commit if revision == "commit" else revision
    assert download_folder("org/model", revision) == fetched
    assert download_folder("org/model", revision, HubAccess(local_files_only=True)) == fetched
    for repo, other in (("org/other", None), ("org/model", "v2")):
        with pytest.raises(
            ConnectionError, match=f"hf-hub:{repo}.* is not in the cache.*local-dir"
        ):
            download_folder(repo, other)


def test_a_half_cached_model_is_not_taken_for_whole(hub, folder, monkeypatch):
    commit = hub.add("org/model", contents(folder))
    (download_folder("org/model") / "golden.safetensors").unlink()
    offline(monkeypatch)
    with pytest.raises(ConnectionError, match="could not be fetched"):
        download_folder("org/model", commit)


def test_the_cache_is_where_the_caller_says_and_fetched_anew_if_so_wished(hub, folder, tmp_path):
    hub.add("org/model", contents(folder))
    access = HubAccess(cache_dir=tmp_path / "elsewhere")
    assert tmp_path / "elsewhere" in download_folder("org/model", access=access).parents
    assert not (tmp_path / "cache").exists()
    del hub.log[:]
    again = HubAccess(cache_dir=tmp_path / "elsewhere", force_download=True)
    download_folder("org/model", access=again)
    assert len(hub.asked("GET", "/resolve/")) == len(contents(folder))
    with pytest.raises(ValueError, match="force_download and local_files_only contradict"):
        HubAccess(force_download=True, local_files_only=True)


def test_the_client_still_leaves_content_unchecked(hub, folder):
    """The gap that download_folder closes; when this fails, half of it can go."""
    hub.add("org/model", contents(folder))
    hub.tamper["config.json"] = 1
    file = huggingface_hub.hf_hub_download("org/model", "config.json")
    assert Path(file).read_bytes() != contents(folder)["config.json"]
    assert json.loads(contents(folder)["config.json"]) == CONFIG
