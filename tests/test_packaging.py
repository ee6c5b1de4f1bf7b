"""What is installed is what is meant: dependencies, package data, version, README."""

import ast
import dataclasses
import html.parser
import importlib.util
import re
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from flax import nnx
from hatchling.builders.wheel import WheelBuilder

import equizoo
from equizoo.graph import Budget, batch_frames
from equizoo.hub import split_front_matter
from equizoo.registry import MODELS, CardRegistry
from equizoo.structure import Structure
from equizoo.zoo._base import energy_forces_stress

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Not imported by name: jaxlib is jax's other half, and listed to exclude its faulty releases.
IMPLIED = {"jaxlib"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", r)[0]) for r in requirements}


def third_party_imports(folder: Path) -> set[str]:
    """Top-level names that the files of a folder import, at the top or inside functions."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"equizoo"}


def distributions(imports: set[str]) -> dict[str, set[str]]:
    """The installed distributions that provide each import."""
    known = packages_distributions()
    return {name: {normalized(d) for d in known.get(name, [name])} for name in imports}


def import_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_models_table():
    return import_file(ROOT / "docs/models_table.py")


def test_every_import_is_a_declared_dependency():
    core = required(PROJECT["dependencies"])
    # what the benchmark of tensor products compares with where it is installed
    peers = required(PROJECT["optional-dependencies"]["peers"])
    # what step one of a conversion, a program of its own, opens a checkpoint with
    parity = required(PROJECT["optional-dependencies"]["parity"])
    # MACE's data, a board and machine code, where they are asked for
    names = ("hdf5", "wandb", "native")
    extras = [required(PROJECT["optional-dependencies"][name]) for name in names]
    known = core | peers | parity | set().union(*extras)
    provided = distributions(third_party_imports(ROOT / "equizoo"))
    assert {name for name, by in provided.items() if not by & known} == set()


def test_every_dependency_is_imported():
    provided = distributions(third_party_imports(ROOT / "equizoo"))
    assert required(PROJECT["dependencies"]) - set().union(*provided.values()) == IMPLIED


def test_jaxlib_is_required_like_jax():
    found = [re.match(r"(jax|jaxlib)([<>=!].*)", r) for r in PROJECT["dependencies"]]
    specifiers = {match[1]: match[2] for match in found if match}
    assert specifiers["jax"] == specifiers["jaxlib"]


def test_the_version_is_that_of_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", equizoo.__version__)
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == equizoo.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_the_wheel_holds_the_package_its_data_and_the_cards(wheel):
    expected = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "equizoo").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    } | {
        f"equizoo/{file.relative_to(ROOT)}"
        for file in (ROOT / "model_cards").rglob("*")
        if file.is_file()
    }
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_the_wheel_is_small(wheel):
    assert sum(size for name, size in wheel.items() if "/bundled/datasets/" in name) < 2**20
    assert sum(wheel.values()) < 60 * 2**20
    for name, size in wheel.items():
        assert size < 20 * 2**20, f"{name} belongs on the Hub, not in the package"


def test_the_readme_shows_the_released_models():
    table = load_models_table()
    readme = (ROOT / "README.md").read_text("utf-8")
    message = "the model cards have changed: run `make readme`"
    assert readme == table.readme_with(readme, table.models_table(MODELS)), message


def test_the_page_of_oc20_shows_the_published_results():
    table = import_file(ROOT / "docs/open_catalyst_table.py")
    page = (ROOT / "docs/oc20-oc22.md").read_text("utf-8")
    assert page == table.generated_page(page), "run `make readme`"
    with pytest.raises(ValueError, match="lacks the lines '<!-- tried:begin -->'"):
        table.generated_page("# OC20")


@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("equiformer_table", "| training step | equizoo |"),
        ("tdn_table", "| 2 | TDN exact, matrix |"),
        ("fine_tuning_table", "| acetylacetone | 50 |"),
    ],
)
def test_pages_show_what_was_measured(script, row):
    tables = import_file(ROOT / f"docs/{script}.py")
    page = tables.PAGE.read_text("utf-8")
    assert page == tables.generated_page(page), "run `make readme`"
    assert row in page


def test_the_table_of_a_card(tmp_path):
    example = (ROOT / "model_cards/README.md").read_text("utf-8")
    card = example.partition("```yaml\n")[2].partition("```")[0].replace("3f0c...", 64 * "a")
    fields, _ = split_front_matter(card)
    card = card.replace("forces_mae_", "forces_rmse_")
    (tmp_path / f"{fields['name']}.md").write_text(card, "utf-8")
    text = load_models_table().models_table(CardRegistry(tmp_path))
    for part in (fields["name"], "H C N O", "5 Å", "51,200", "0.2 meV/atom", "8.1 meV/Å"):
        assert part in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert columns == [7, 7, 7, 8, 8, 8]


@pytest.fixture(scope="module")
def zoo_page():
    return import_file(ROOT / "docs/zoo_page.py")


class Page(html.parser.HTMLParser):
    """Tags opened and not closed, addresses, and the text of cells."""

    VOID = {"meta", "input", "img", "line", "circle", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_zoo_page_is_that_of_the_cards(zoo_page):
    text = zoo_page.PAGE.read_text("utf-8")
    assert text == zoo_page.page(MODELS), "the model cards have changed: run `make readme`"
    page = Page(text)
    assert page.open == []
    for name in MODELS:
        assert page.words.count(name) >= 1
    for address in page.addresses:
        assert (zoo_page.PAGE.parent / address).exists(), f"{address}: the page works by itself"


def test_the_zoo_page_draws_accuracy_against_speed(zoo_page):
    base = MODELS["mace-3bpa"]
    speed = {"device": "GPU <1>", "dtype": "float32"}
    models = {
        name: dataclasses.replace(
            base,
            name=name,
            architecture=architecture,
            metrics=({"dataset": "set", "split": "hot", "forces_mae_meV_per_A": error},),
            speed=({**speed, "ms_per_atom": time},),
        )
        for name, architecture, error, time in (("a", "mace", 10, 0.1), ("b", "tdn", 1000, 10))
    }
    text = zoo_page.page(models)
    assert Page(text).open == []
    (figure,) = [part for part in text.split("<figure>") if "set/hot, energy" in part]
    assert "GPU &lt;1&gt;" in figure and "time [ms per atom]" in figure
    # the slow and bad one is above and to the right of the other
    first, second = (
        re.search(rf"(?s){shape}<title>{name}: .*?x=\"([\d.]+)\" y=\"([\d.]+)\"", figure).groups()
        for shape, name in (('r="5" fill="#0072B2"/>', "a"), ('fill="#D55E00"/>', "b"))
    )
    assert float(second[0]) > float(first[0]) and float(second[1]) < float(first[1])
    without = zoo_page.page({"a": dataclasses.replace(models["a"], speed=())})
    assert "no speeds measured yet" in without
    assert "No model has been evaluated" in zoo_page.page({})


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the lines '<!-- models:begin -->'"):
        load_models_table().readme_with("# equizoo\n", "")


def test_the_architecture_of_the_guide_works(tmp_path):
    guide = (ROOT / "docs/adding-an-architecture.md").read_text("utf-8")
    file = tmp_path / "pair.py"
    file.write_text(guide.partition("```python\n")[2].partition("```")[0], "utf-8")
    config = import_file(file).PairConfig(
        atomic_numbers=(1, 8), cutoff=3.0, avg_num_neighbors=2.0, width=4
    )
    model = config.build(rngs=nnx.Rngs(0))

    def predict(positions):
        structure = Structure.from_atoms(Atoms("OH2", positions))
        frames = [config.frame(structure)]
        budget = Budget.of(frames, nodes=8, graphs=2)
        graph = batch_frames(frames, budget, np.float64)
        return energy_forces_stress(model, jax.tree.map(jnp.asarray, graph))

    positions, step = molecule("H2O").positions, np.zeros((3, 3))
    step[1, 2] = 1e-4  # [Å]
    slope = (predict(positions + step).energy[0] - predict(positions - step).energy[0]) / 2e-4
    np.testing.assert_allclose(predict(positions).forces[1, 2], -slope, rtol=1e-6)


def test_links_between_documents_lead_somewhere():
    dead = []
    for file in [*ROOT.glob("*.md"), *ROOT.glob("[bdmr]*/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text("utf-8")):
            if not (file.parent / target).exists():
                dead.append(f"{file.relative_to(ROOT)}: {target}")
    assert dead == []
