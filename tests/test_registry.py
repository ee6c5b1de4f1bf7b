"""Classes are found by file name, released models by card; nothing is loaded until asked."""

import sys
import textwrap

import pytest

from equizoo import hub, registry
from equizoo.config import to_dict
from equizoo.hub import join_front_matter, save_folder, split_front_matter
from equizoo.hub_client import HubAccess
from equizoo.registry import (
    ARCHITECTURES,
    MODELS,
    TENSOR_PRODUCTS,
    CardRegistry,
    FolderRegistry,
    UnknownName,
    find_model_folder,
    list_models,
)
from equizoo.structure import EnergyReference

SHAPE = "from fake_shapes._base import Shape\n"
FILES = {
    "__init__": "",
    "_base": "class Shape: pass\n",
    "_round": "raise AssertionError('helpers are not entries')\n",
    "circle": SHAPE + "class Circle(Shape): pass\nAlias = Circle\nclass Unrelated: pass\n",
    "disc": SHAPE + "from fake_shapes.circle import Circle\nclass Disc(Shape): pass\n",
    "hollow": SHAPE,
    "twins": SHAPE + "class One(Shape): pass\nclass Two(Shape): pass\n",
    "broken": "import a_package_that_does_not_exist\n",
}
NAMES = ["broken", "circle", "disc", "hollow", "twins"]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    package = tmp_path / "fake_shapes"
    package.mkdir()
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text)
    (package / "notes.txt").write_text("no module")
    (package / "folder").mkdir()
    (package / "folder" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield FolderRegistry("fake_shapes", base="Shape")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_shapes"]:
        del sys.modules[name]


def test_listing_imports_nothing(shapes):
    assert list(shapes) == NAMES
    assert len(shapes) == 5
    assert "circle" in shapes and "_base" not in shapes and "folder" not in shapes
    assert not [name for name in sys.modules if name.startswith("fake_shapes.")]


def test_a_name_gives_the_one_class_defined_in_its_file(shapes):
    circle = shapes["circle"]
    assert (circle.__name__, circle.__module__) == ("Circle", "fake_shapes.circle")
    assert shapes["circle"] is circle
    # Circle, which disc.py only imports, is not a second entry.
    assert shapes["disc"].__name__ == "Disc"
    assert "fake_shapes.twins" not in sys.modules


def test_a_class_or_instance_knows_its_name(shapes):
    assert shapes.name_of(shapes["circle"]) == "circle"
    assert shapes.name_of(shapes["disc"]()) == "disc"
    base = shapes["circle"].__mro__[1]
    subclass = type("Circle", (shapes["circle"],), {"__module__": "fake_shapes.circle"})
    for stranger in (base, int, 3, subclass):
        with pytest.raises(ValueError, match="is not a registered Shape.*Known: broken, circle"):
            shapes.name_of(stranger)


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_an_unknown_name_suggests_the_nearest(shapes, error):
    with pytest.raises(error) as caught:
        shapes["circel"]
    assert str(caught.value) == (
        "Unknown Shape 'circel'. Did you mean 'circle'? Known: broken, circle, disc, hollow, twins."
    )
    with pytest.raises(error, match="^Unknown Shape '_base'. Known: broken"):
        shapes["_base"]
    assert shapes.get("zzz") is None


def test_a_file_defines_exactly_one_class(shapes):
    with pytest.raises(ValueError, match=r"twins.py must define exactly one Shape, found One, Two"):
        shapes["twins"]
    with pytest.raises(ValueError, match=r"hollow.py must define exactly one Shape, found none"):
        shapes["hollow"]


def test_a_failing_import_is_not_disguised(shapes):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist"):
        shapes["broken"]


@pytest.mark.parametrize("folder", [TENSOR_PRODUCTS, ARCHITECTURES], ids=lambda f: f.base)
def test_every_file_of_the_package_is_a_proper_entry(folder):
    for name in folder:
        assert folder.name_of(folder[name]) == name
        assert folder[name].registry is folder, "the base class declares `registry: ClassVar`"


CARD = """
name: mace-small
architecture: mace
tensor_product: clebsch_gordan
elements: [H, C, O]
cutoff: 5
level_of_theory: wB97X/6-31G(d)
energy_reference: total
license_code: Apache-2.0
license_weights: MIT
license_data: CC-BY-4.0
training_data:
  - {name: 3BPA, license: CC-BY-4.0, citation: Kovacs et al. 2021}
training_hardware: 2 CPU cores
training_hours: 3.5
parameters: 1000
sha256: SHA
hub_repo: null
hub_revision: null
metrics:
  - {dataset: 3bpa, split: test_300K, energy_mae_meV_per_atom: 1, forces_mae_meV_per_A: 8.5}
license: mit
library_name: equizoo
tags: [jax]
datasets: []
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Two cards, and empty places for their weights."""
    monkeypatch.setattr(registry, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model_cards"
    folder.mkdir()
    (folder / "README.md").write_text("# not a card")
    write_card(folder, "mace-small")
    other = {"architecture": "equiformer", "elements": ["Pt", "O"], "license_weights": "CC-BY-4.0"}
    write_card(folder, "equiformer-oc20", **other, level_of_theory="RPBE", tensor_product="gaunt")
    return CardRegistry(folder)


def write_card(folder, stem, **changes):
    fields, _ = split_front_matter(f"---{CARD}---\n".replace("SHA", "a" * 64))
    (folder / f"{stem}.md").write_text(
        join_front_matter(fields | {"name": stem} | changes, "Prose.")
    )


def write_weights(folder):
    contents = {"config": {}, "arrays": {}, "golden": {}, "card": None}
    return save_folder(folder, **contents)


def test_a_card_is_an_entry(cards):
    assert list(cards) == ["equiformer-oc20", "mace-small"] and len(cards) == 2
    entry = cards["mace-small"]
    assert entry.elements == ("H", "C", "O")
    assert entry.energy_reference is EnergyReference.TOTAL
    assert repr(entry.cutoff) == "5.0"
    assert entry.training_data[0].license == "CC-BY-4.0"
    assert entry.metrics[0]["energy_mae_meV_per_atom"] == 1.0
    assert entry.metrics[0]["split"] == "test_300K"
    assert entry.hub_repo is None and entry.speed == ()
    assert to_dict(entry)["training_data"][0]["name"] == "3BPA"


def test_names_are_listed_without_reading_cards(cards):
    (cards.folder / "zzz.md").write_text("no card")
    assert list(cards) == ["equiformer-oc20", "mace-small", "zzz"]
    with pytest.raises(ValueError, match="model_cards/zzz.md has no front matter"):
        cards["zzz"]
    with pytest.raises(UnknownName, match="Unknown model 'mace-smal'. Did you mean 'mace-small'?"):
        cards["mace-smal"]


def test_everything_wrong_with_a_card_is_said_at_once(cards):
    write_card(cards.folder, "bad", cutof=5.0, parameters=10.5, energy_reference="totl")
    with pytest.raises(ValueError) as error:
        cards["bad"]
    message = str(error.value)
    assert message.startswith("model_cards/bad.md does not describe a valid ModelEntry:")
    assert "cutof: unknown field. Did you mean 'cutoff'?" in message
    assert "parameters: expected int, got 10.5" in message
    assert "energy_reference: expected one of 'total', 'adsorption'" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elements": ["H", "Xx"]}, "elements must be chemical symbols"),
        ({"elements": ["H", "X"]}, "elements must be chemical symbols"),
        ({"elements": ["H", "H"]}, "elements must be chemical symbols, each once"),
        ({"elements": []}, "elements must be chemical symbols"),
        ({"elements": ["H", False]}, r"elements\[1\]: expected str, got False"),
        ({"cutoff": 0.0}, "cutoff, parameters must be positive"),
        ({"parameters": 0}, "cutoff, parameters must be positive"),
        ({"sha256": "abc"}, "sha256 must be 64 hexadecimal digits"),
        ({"hub_repo": "org/model"}, "hub_revision must be a full commit hash"),
        ({"hub_revision": COMMIT}, "given together with hub_repo"),
        ({"hub_repo": "org/model", "hub_revision": "main"}, "must be a full commit hash"),
        ({"license": "other"}, "license 'other' needs license_name and license_link"),
        ({"library_name": "torch"}, "library_name: expected one of 'equizoo'"),
        (
            {"metrics": [{"dataset": "x", "mae_eV": 1.0}]},
            r"metrics\[0\] must hold the words dataset",
        ),
        ({"metrics": [{"dataset": "x", "split": "y", "mae_eV": "low"}]}, r"metrics\[0\] must hold"),
        ({"metrics": [{"dataset": "x", "split": 3}]}, r"metrics\[0\] must hold the words"),
        (
            {"speed": [{"device": "CPU", "ms_per_atom": 1.0}]},
            r"speed\[0\] must hold the words device",
        ),
        ({"name": "other"}, "bad.md says name: other; expected the file's own name"),
        ({"name": "Bad Name"}, "name 'Bad Name' must be lower-case words"),
    ],
)
def test_contradictory_cards_are_refused(cards, change, message):
    write_card(cards.folder, "bad", **change)
    with pytest.raises(ValueError, match=message):
        cards["bad"]


def test_correct_optional_fields_are_accepted(cards):
    speed = [{"device": "2 CPU cores", "dtype": "float32", "ms_per_atom": 0.9}]
    licence = {"license": "other", "license_name": "asl", "license_link": "https://example.org"}
    pinned = {"hub_repo": "org/model", "hub_revision": COMMIT}
    write_card(cards.folder, "good", speed=speed, base_model="org/base", **licence, **pinned)
    assert cards["good"].hub_revision == COMMIT
    assert cards["good"].speed[0]["ms_per_atom"] == 0.9


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        ({}, ["equiformer-oc20", "mace-small"]),
        ({"pattern": "mace*"}, ["mace-small"]),
        ({"pattern": "MACE-small"}, ["mace-small"]),
        ({"pattern": "mace"}, []),
        ({"elements": ["O"]}, ["equiformer-oc20", "mace-small"]),
        ({"elements": ["O", "H"]}, ["mace-small"]),
        ({"elements": ["H", "Pt"]}, []),
        ({"architecture": "equi*"}, ["equiformer-oc20"]),
        ({"tensor_product": "clebsch_gordan"}, ["mace-small"]),
        ({"license": "mit"}, ["mace-small"]),
        ({"license": "CC-BY-4.0"}, ["equiformer-oc20"]),
        ({"level_of_theory": "wb97x*"}, ["mace-small"]),
        ({"elements": ["O"], "level_of_theory": "RPBE"}, ["equiformer-oc20"]),
        ({"architecture": "mace", "tensor_product": "gaunt"}, []),
        ({"dataset": "3bpa/*"}, ["equiformer-oc20", "mace-small"]),
        ({"dataset": "3BPA/test_300k", "architecture": "mace"}, ["mace-small"]),
        ({"dataset": "rmd17/*"}, []),
        ({"max_error": {"forces_mae_meV_per_A": 8.5}}, ["equiformer-oc20", "mace-small"]),
        ({"max_error": {"forces_mae_meV_per_A": 8.4}}, []),
        ({"max_error": {"forces_mae_meV_per_A": 9.0}, "dataset": "rmd17/*"}, []),
    ],
)
def test_models_are_chosen_by_all_conditions(cards, conditions, names):
    assert [entry.name for entry in list_models(**conditions, models=cards)] == names


def test_an_unknown_element_is_refused(cards):
    with pytest.raises(ValueError, match="'Xx', 'h': no such element"):
        list_models(elements=["h", "O", "Xx"], models=cards)


def test_errors_are_bounded_on_every_data_set_chosen(cards):
    rows = [
        {"dataset": "3bpa", "split": "cold", "forces_mae_meV_per_A": 5.0},
        {"dataset": "3bpa", "split": "hot", "forces_mae_meV_per_A": 50.0},
        {"dataset": "other", "split": "all", "energy_mae_meV": 1.0},
    ]
    write_card(cards.folder, "two", metrics=rows)

    def found(**conditions):
        return "two" in [entry.name for entry in list_models(**conditions, models=cards)]

    limit = {"forces_mae_meV_per_A": 20.0}
    assert not found(max_error=limit) and found(max_error=limit, dataset="3bpa/cold")
    assert not found(max_error=limit, dataset="other/*"), "it states no such error there"
    with pytest.raises(ValueError, match="No card states the error 'force_mae'. .*forces_mae_meV"):
        found(max_error={"force_mae": 1.0})


def test_bundled_weights_come_before_cached_ones_and_both_before_the_hub(cards, tmp_path):
    entry = cards["mace-small"]
    assert entry.source == "hub"
    with pytest.raises(ValueError, match="mace-small is not on the Hub; expected its weights in"):
        find_model_folder("mace-small", models=cards)

    sha256 = write_weights(tmp_path / "cache" / "models" / "mace-small")
    write_card(cards.folder, "mace-small", sha256=sha256)
    assert entry.source == "cached"
    assert find_model_folder("mace-small", models=cards) == tmp_path / "cache/models/mace-small"

    write_weights(tmp_path / "bundled" / "mace-small")
    assert entry.source == "bundled"
    assert find_model_folder("mace-small", models=cards) == tmp_path / "bundled/mace-small"


CHECKPOINT = {
    "format": "mace-torch",
    "file": "a.model",
    "address": "https://example.org/a.model",
    "sha256": None,
}
UNSTATED = dict.fromkeys(("training_hardware", "training_hours", "parameters", "sha256"))


def test_a_checkpoint_is_converted_where_it_is_used(cards, tmp_path):
    write_card(cards.folder, "theirs", checkpoint=CHECKPOINT, **UNSTATED)
    entry = cards["theirs"]
    assert entry.source == "checkpoint" and entry.checkpoint.terms is None
    with pytest.raises(ValueError, match="not been converted here yet.*convert mace-torch theirs"):
        find_model_folder("theirs", models=cards)
    write_weights(tmp_path / "cache" / "models" / "theirs")
    assert entry.source == "cached"
    assert find_model_folder("theirs", models=cards) == tmp_path / "cache/models/theirs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (UNSTATED, "may be null only with a checkpoint"),
        (
            UNSTATED | {"checkpoint": CHECKPOINT | {"address": "http://example.org"}},
            "must start with https",
        ),
        (UNSTATED | {"checkpoint": CHECKPOINT | {"file": "../a"}}, "file be a bare file name"),
        (UNSTATED | {"checkpoint": CHECKPOINT | {"sha256": "?"}}, "64 hexadecimal digits"),
        ({"checkpoint": CHECKPOINT}, "sha256 and hub_repo must be null"),
        (UNSTATED | {"checkpoint": CHECKPOINT | {"format": "x"}}, "expected one of 'mace-torch'"),
    ],
)
def test_contradictory_checkpoints_are_refused(cards, change, message):
    write_card(cards.folder, "bad", **change)
    with pytest.raises(ValueError, match=message):
        cards["bad"]


def test_checkpoints_of_others_state_no_hash_that_is_not_theirs():
    """Everything that has terms shows them, and names the licence that is to be accepted."""
    entries = [entry for entry in MODELS.values() if entry.checkpoint is not None]
    assert {"mace-mp-0-small", "mace-mpa-0-medium", "mace-mh-1"} <= {e.name for e in entries}
    for entry in entries:
        assert (entry.checkpoint.terms is not None) == (entry.license_weights == "ASL")
        assert entry.checkpoint.file == entry.checkpoint.address.rsplit("/", 1)[1]


def test_weights_other_than_the_cards_are_refused(cards, tmp_path):
    write_weights(tmp_path / "bundled" / "mace-small")
    with pytest.raises(ValueError, match=f"SHA-256 on the card of mace-small \\({'a' * 64}\\)"):
        find_model_folder("mace-small", models=cards)


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.delenv("EQUIZOO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(registry.cache_folder()) == "/home/someone/.cache/equizoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(registry.cache_folder()) == "/xdg/equizoo"
    monkeypatch.setenv("EQUIZOO_CACHE", "/mine")
    assert str(registry.cache_folder()) == "/mine"


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What would be fetched from the Hub, in place of fetching it."""
    calls = []

    def download(repo, revision, access, expected_sha256=None):
        assert access == HubAccess()
        calls.append((repo, revision, expected_sha256))
        return tmp_path / "fetched"

    monkeypatch.setattr(registry, "download_folder", download)
    return calls


def test_released_models_are_fetched_at_the_pinned_commit_with_their_hash(
    cards, tmp_path, downloads
):
    sha256 = "b" * 64
    pinned = {"hub_repo": "org/model", "hub_revision": COMMIT}
    write_card(cards.folder, "mace-small", sha256=sha256, **pinned)
    for spec in ("mace-small", f"mace-small@{COMMIT}"):
        assert find_model_folder(spec, models=cards) == tmp_path / "fetched"
    # The card knows nothing of another revision's weights, and bundled ones are not that revision.
    write_weights(tmp_path / "bundled" / "mace-small")
    assert find_model_folder("mace-small@v2", models=cards) == tmp_path / "fetched"
    assert downloads == [("org/model", COMMIT, sha256)] * 2 + [("org/model", "v2", None)]


def test_hub_addresses_are_fetched_as_given(downloads, tmp_path):
    assert find_model_folder("hf-hub:org/other@v1") == tmp_path / "fetched"
    assert find_model_folder("hf-hub:org/other") == tmp_path / "fetched"
    assert downloads == [("org/other", "v1", None), ("org/other", None, None)]


def test_folders_are_found_by_path_and_names_come_first(cards, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mace-small").mkdir()
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    assert find_model_folder(mine, models=cards) == mine
    assert find_model_folder(str(mine), models=cards) == mine
    assert find_model_folder("mine", models=cards).samefile(mine)
    assert find_model_folder("local-dir:mine", models=cards).samefile(mine)
    with pytest.raises(ValueError, match="mace-small is not on the Hub"):
        find_model_folder("mace-small", models=cards)
    assert find_model_folder("./mace-small", models=cards).samefile(tmp_path / "mace-small")
    with pytest.raises(ValueError, match="local-dir:nowhere: nowhere is not a folder"):
        find_model_folder("local-dir:nowhere", models=cards)
    with pytest.raises(UnknownName, match="Did you mean 'mace-small'.*Or give hf-hub:"):
        find_model_folder("mace-smal", models=cards)


def test_released_cards_are_valid():
    for name, entry in MODELS.items():
        assert entry.architecture in ARCHITECTURES, name
        assert entry.tensor_product in TENSOR_PRODUCTS, name
        if entry.source == "bundled":
            folder = hub.load_folder(find_model_folder(name), entry.sha256)
            assert folder.config["architecture"] == entry.architecture


def test_the_example_in_the_cards_readme_is_valid(cards):
    text = (MODELS.folder / "README.md").read_text("utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0].replace("3f0c...", "a" * 64)
    (cards.folder / "mace-3bpa.md").write_text(textwrap.dedent(example))
    assert cards["mace-3bpa"].speed[0]["ms_per_atom"] == 0.9
