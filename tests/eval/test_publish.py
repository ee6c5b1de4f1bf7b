"""Potentials pushed to a Hub on the loopback and loaded back by name, address and revision."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from hub_server import TOKEN
from huggingface_hub import ModelCardData, constants
from models import mace_potential

import equizoo
from equizoo import cli, registry
from equizoo.eval.potential import Potential, load
from equizoo.eval.publish import hub_card, pin, publish, repository_files
from equizoo.hub import (
    CARD,
    REQUIRED,
    WEIGHTS,
    join_front_matter,
    load_folder,
    save_folder,
    sha256_of,
    split_front_matter,
)
from equizoo.hub_client import Upload
from equizoo.registry import MODELS

FIELDS = {
    "name": "tiny",
    "license": "mit",
    "library_name": "equizoo",
    "tags": ["interatomic-potential", "mace"],
    "datasets": ["3bpa", "org/set"],
    "architecture": "mace",
    "tensor_product": "clebsch_gordan",
    "elements": ["H", "C", "O"],
    "cutoff": 3.5,
    "level_of_theory": "none",
    "energy_reference": "total",
    "license_code": "Apache-2.0",
    "license_weights": "MIT",
    "license_data": "MIT",
    "training_data": [{"name": "3bpa", "license": "MIT", "citation": "doi"}],
    "training_hardware": "2 CPU cores",
    "training_hours": 0.1,
    "parameters": 100,
    "metrics": [{"dataset": "3bpa", "split": "test_300K", "forces_mae_meV_per_A": 12.5}],
}


@pytest.fixture(scope="module")
def potential():
    return mace_potential(name="tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, potential):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    potential.save(folder)
    return folder


@pytest.fixture
def zoo(saved, tmp_path, monkeypatch):
    """A zoo with one released model: card, image, weights in the cache."""
    cards = tmp_path / "cards"
    (cards / "tiny").mkdir(parents=True)
    card = join_front_matter(FIELDS | {"sha256": sha256_of(saved / WEIGHTS)}, "# tiny\n")
    (cards / "tiny.md").write_text(card)
    (cards / "tiny" / "parity.png").write_bytes(b"image")
    (cards / "tiny" / "certificate.json").write_text("{}")
    (cards / "tiny" / "notes.txt").write_text("not published")
    monkeypatch.setattr(MODELS, "folder", cards)
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "equizoo"))
    home = tmp_path / "equizoo/models"
    home.mkdir(parents=True)
    home.joinpath("tiny").symlink_to(saved)
    return cards


def assert_same(one: Potential, other: Potential):
    for a, b in zip(jax.tree.leaves(one._params), jax.tree.leaves(other._params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.describe() | {"revision": "", "name": ""}) == (
        other.describe() | {"revision": "", "name": ""}
    )


def quickly(spec) -> Potential:
    return load(spec, check_golden=False)


def test_a_potential_is_pushed_and_comes_back(hub, potential):
    upload = potential.push_to_hub("org/mine", tag="v1", private=True, commit_message="First")
    assert sorted(hub.repositories["org/mine"].commits[upload.commit]) == sorted(
        [".gitattributes", *REQUIRED, CARD]
    )
    for spec in ("hf-hub:org/mine", "hf-hub:org/mine@v1", f"hf-hub:org/mine@{upload.commit}"):
        loaded = quickly(spec)
        assert (loaded.revision, loaded.name) == (upload.commit, spec[7:].partition("@")[0])
        assert loaded.describe()["revision"] == upload.commit
    assert_same(loaded, potential)
    assert_same(Potential.from_pretrained("org/mine", revision="v1"), potential)  # golden and all
    fields, body = split_front_matter(loaded.card)
    assert fields["library_name"] == "equizoo" and "# tiny" in body and "cutoff A: 3.5" in body
    # what came from the Hub goes back as it came
    potential.card, card = loaded.card, potential.card
    again = potential.push_to_hub("org/mine")
    potential.card = card
    assert (again.commit, again.changed) == (upload.commit, False)


def test_weights_that_are_not_contiguous_survive(hub):
    """safetensors writes a transposed view wrongly, without an error."""
    potential = mace_potential()
    flat = dict(nnx.to_flat_state(potential._params))
    path = next(path for path, param in flat.items() if param.ndim == 2 and min(param.shape) > 1)
    values = np.asarray(flat[path][...])
    flat[path] = flat[path].replace(np.asarray(values.T, order="C").T)
    assert not flat[path][...].flags.c_contiguous
    potential._params = nnx.from_flat_state(flat.items())
    potential.push_to_hub("org/mine")
    found = dict(nnx.to_flat_state(quickly("hf-hub:org/mine")._params))
    np.testing.assert_array_equal(found[path][...], values)


def test_save_pretrained_saves_and_pushes_if_asked(hub, tmp_path, potential):
    assert potential.save_pretrained(tmp_path / "here") is None
    assert hub.log == []
    for spec in (tmp_path / "here", f"local-dir:{tmp_path / 'here'}"):
        assert_same(Potential.from_pretrained(spec, check_golden=False), potential)
    upload = potential.save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="org/there")
    assert hub.repositories["org/there"].branches["main"] == upload.commit
    with pytest.raises(ValueError, match="private, repo_id given without push_to_hub=True"):
        potential.save_pretrained(tmp_path / "new", repo_id="org/new", private=True)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        potential.save_pretrained(tmp_path / "here")


def test_offline_what_is_cached_loads_and_the_rest_says_why(hub, monkeypatch, potential):
    upload = potential.push_to_hub("org/mine")
    quickly("hf-hub:org/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert quickly("hf-hub:org/mine").revision == upload.commit
    options = dict(local_files_only=True, check_golden=False)
    assert Potential.from_pretrained("org/mine", **options).revision == upload.commit
    with pytest.raises(ConnectionError, match="hf-hub:org/other is not in the cache"):
        quickly("hf-hub:org/other")


# ---- released models


def test_a_released_model_is_published_with_all_that_belongs_to_it(hub, zoo, saved):
    upload = publish("tiny", "org/tiny", tag="v1")
    held = hub.repositories["org/tiny"].commits[upload.commit]
    names = {*REQUIRED, CARD, "tiny/parity.png", "tiny/certificate.json", ".gitattributes"}
    assert set(held) == names
    for name in REQUIRED:
        assert held[name] == (saved / name).read_bytes(), "the very files, not another saving"
    again = publish("tiny", "org/tiny", tag="v1")
    assert (again.commit, again.changed) == (upload.commit, False)

    # once pinned, its name leads there, and only there
    (registry.cache_folder() / "models/tiny").unlink()
    with pytest.raises(ValueError, match="tiny is not on the Hub"):
        load("tiny")
    pin("tiny", upload)
    assert MODELS["tiny"].hub_revision == upload.commit
    loaded = quickly("tiny")
    assert (loaded.name, loaded.revision) == ("tiny", upload.commit)
    assert publish("tiny", "org/tiny").changed is False, "the card on the Hub does not name itself"


def test_a_released_model_tampered_with_on_the_hub_is_refused(hub, zoo, saved, tmp_path):
    publish("tiny", "org/tiny")
    (registry.cache_folder() / "models/tiny").unlink()
    contents = load_folder(saved)
    arrays = {key: value * 1.5 for key, value in contents.arrays.items()}
    given = dict(config=contents.config, golden=contents.golden, card=None)
    save_folder(tmp_path / "evil", arrays=arrays, **given)
    commit = hub.add("org/tiny", {f.name: f.read_bytes() for f in (tmp_path / "evil").iterdir()})
    pin("tiny", Upload("org/tiny", commit, "", True))
    with pytest.raises(ValueError, match="model.safetensors has SHA-256 .*, expected .*tampered"):
        load("tiny")
    # without the registry's hash, the golden outputs still tell
    with pytest.raises(ValueError, match="does not give the outputs stored with it"):
        load("hf-hub:org/tiny")


def test_a_model_that_fails_its_golden_outputs_is_not_published(hub, saved, tmp_path):
    contents = load_folder(saved)
    arrays = {key: value * 1.5 for key, value in contents.arrays.items()}
    given = dict(config=contents.config, golden=contents.golden, card=None)
    save_folder(tmp_path / "bad", arrays=arrays, **given)
    with pytest.raises(ValueError, match="does not give the outputs stored with it"):
        publish(str(tmp_path / "bad"), "org/bad")
    assert hub.repositories == {}


def test_other_peoples_checkpoints_are_not_redistributed(hub):
    with pytest.raises(ValueError, match="mace-off23-small is other people's checkpoint.*ASL"):
        publish("mace-off23-small", "org/theirs")
    with pytest.raises(ValueError, match="expected a released model"):
        pin("no-model", Upload("org/x", "a" * 40, "", True))


def test_the_hub_understands_the_card(zoo):
    potential = mace_potential(name="tiny", card=(zoo / "tiny.md").read_text())
    fields, body = split_front_matter(hub_card(potential))
    assert body == "# tiny\n"
    # what the Hub reads, by its own client
    data = ModelCardData(**{key.replace("-", "_"): value for key, value in fields.items()})
    assert (data.license, data.library_name, data.datasets) == ("mit", "equizoo", ["org/set"])
    assert data.tags == FIELDS["tags"]
    index = huggingface_results(fields)
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in index] == [
        ("3bpa", "test_300K", "forces_mae_meV_per_A", 12.5)
    ]
    # and what we read
    own = fields["equizoo"]
    assert own["architecture"] == "mace" and own["sha256"] and own["license_weights"] == "MIT"
    assert not {"hub_repo", "metrics"} & set(own)
    plain = mace_potential(name="tiny", card="# Mine\n")
    assert split_front_matter(hub_card(plain))[1] == "# Mine\n"


def huggingface_results(fields):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    name, results = model_index_to_eval_results(fields["model-index"])
    assert name == "tiny"
    return results


def test_the_command_publishes_and_a_fresh_process_loads_it(hub, zoo, saved, tmp_path, capsys):
    """The way of a user: addresses and tokens from the environment, read when the client starts."""
    cli.main(["publish", "tiny", "--repo", "org/tiny", "--dry-run", "--json"])
    assert set(json.loads(capsys.readouterr().out)["files"]) == set(repository_files("tiny"))
    assert hub.log == []
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": os.path.dirname(os.path.dirname(equizoo.__file__)),
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def python(*arguments, **changes):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, env=environment | changes, capture_output=True, text=True, timeout=600
        )

    done = python(
        "-m", "equizoo.cli", "publish", saved, "--repo", "org/tiny", "--tag", "v1", "--private"
    )
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["org/tiny"].tags["v1"]
    assert commit in done.stdout
    code = "import equizoo; print(equizoo.load('hf-hub:org/tiny@v1').revision)"
    assert python("-c", code).stdout.strip() == commit
    assert python("-c", code, HF_HUB_OFFLINE="1").stdout.strip() == commit
    refused = python("-m", "equizoo.cli", "publish", saved, "--repo", "org/new", HF_TOKEN="hf_no")
    assert refused.returncode == 2 and "HF_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr
