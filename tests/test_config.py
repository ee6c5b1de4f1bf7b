"""The dataclass is the schema: what round-trips, and what is refused with which words."""

import dataclasses
import enum
import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from equizoo.config import from_dict, from_json, to_dict, to_json
from equizoo.registry import FolderRegistry


class Units(enum.StrEnum):
    EV = "eV"
    MEV = "meV"


@dataclasses.dataclass(frozen=True)
class Radial:
    num_basis: int = 8
    widths: tuple[int, ...] = (64, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    cutoff: float
    atomic_numbers: tuple[int, ...]
    units: Units = Units.EV
    radial: Radial = Radial()
    charge: int | None = None
    periodic: tuple[bool, bool, bool] = (False, True, False)
    kind: Literal["soft", "hard", 3] = "soft"
    references: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    title: str = ""

    def __post_init__(self):
        if self.cutoff <= 0:
            raise ValueError(f"cutoff must be positive, got {self.cutoff}")


CONFIGS = st.builds(
    Config,
    cutoff=st.floats(0.1, 1e300),
    atomic_numbers=st.lists(st.integers()).map(tuple),
    units=st.sampled_from(Units),
    radial=st.builds(Radial, st.integers(), st.lists(st.integers()).map(tuple)),
    charge=st.none() | st.integers(),
    periodic=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    kind=st.sampled_from(["soft", "hard", 3]),
    references=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    notes=st.dictionaries(st.text(), st.text() | st.floats(-1e9, 1e9)),
    title=st.text(),
)


@hypothesis.given(CONFIGS)
def test_json_returns_an_equal_config_of_equal_types(config):
    read = from_json(Config, to_json(config))
    assert read == config
    # Equality alone would take 3 for 3.0 and True for 1.
    assert repr(read) == repr(config)


def test_written_form_is_plain_json_in_field_order():
    config = Config(cutoff=5.0, atomic_numbers=(1, 8), references={"H": -13.6})
    assert list(to_dict(config).items())[:4] == [
        ("cutoff", 5.0),
        ("atomic_numbers", [1, 8]),
        ("units", "eV"),
        ("radial", {"num_basis": 8, "widths": [64, 64]}),
    ]
    assert type(to_dict(config)["units"]) is str
    assert json.loads(to_json(config)) == to_dict(config)


def test_whole_numbers_in_float_fields_become_floats_both_ways():
    config = Config(cutoff=5, atomic_numbers=())
    assert repr(to_dict(config)["cutoff"]) == "5.0"
    read = from_dict(Config, {"cutoff": 5, "atomic_numbers": [], "references": {"H": 1}})
    assert repr((read.cutoff, read.references)) == "(5.0, {'H': 1.0})"
    assert type(to_dict(Config(np.float64(4.5), ()))["cutoff"]) is float


GOOD = {"cutoff": 5.0, "atomic_numbers": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atomic_numbers": [1, 3.5]}, r"atomic_numbers\[1\]: expected int, got 3.5 \(float\)"),
        ({"atomic_numbers": [True]}, r"atomic_numbers\[0\]: expected int, got True \(bool\)"),
        (
            {"atomic_numbers": "1"},
            r"atomic_numbers: expected tuple\[int, \.\.\.\], got '1' \(str\)",
        ),
        ({"cutoff": "5"}, r"cutoff: expected float, got '5' \(str\)"),
        ({"cutoff": True}, "cutoff: expected float, got True"),
        ({"cutoff": float("nan")}, "cutoff: expected float, got nan"),
        ({"cutoff": -1.0}, "cutoff must be positive, got -1.0"),
        ({"title": 3}, "title: expected str, got 3"),
        ({"title": None}, "title: expected str, got None"),
        ({"charge": 0.5}, "charge: expected int, got 0.5"),
        ({"periodic": [1, 0, 0]}, r"periodic\[0\]: expected bool, got 1"),
        ({"periodic": [True, True]}, r"periodic: expected tuple\[bool, bool, bool\]"),
        ({"kind": "sof"}, "kind: expected one of 'soft', 'hard', 3, got 'sof'"),
        ({"kind": 3.0}, "kind: expected one of 'soft', 'hard', 3, got 3.0"),
        ({"units": "GPa"}, "units: expected one of 'eV', 'meV', got 'GPa'"),
        ({"radial": {"num_basis": 8.0}}, "radial.num_basis: expected int, got 8.0"),
        (
            {"radial": {"numbasis": 8}},
            r"radial.numbasis: unknown field. Did you mean 'num_basis'\?",
        ),
        ({"radial": [8]}, r"radial: expected the fields of Radial, got \[8\]"),
        ({"references": {"H": "x"}}, "references.H: expected float, got 'x'"),
        ({"references": {1: 1.0}}, r"references: expected dict\[str, float\], got {1: 1.0}"),
        ({"notes": {"a": False}}, "notes.a: expected str or float, got False"),
        ({"zzz": 1}, "zzz: unknown field. Known: atomic_numbers, charge, cutoff"),
    ],
)
def test_nothing_is_cast_or_dropped(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, GOOD | change)


def test_all_problems_are_raised_at_once_with_their_source():
    broken = {"cutof": 5.0, "radial": {"num_basis": "8"}, "units": "EV"}
    with pytest.raises(ValueError) as error:
        from_dict(Config, broken, where="my.json")
    lines = str(error.value).splitlines()
    assert lines[0] == "my.json does not describe a valid Config:"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [
        "cutof",
        "cutoff",
        "atomic_numbers",
        "units",
        "radial.num_basis",
    ]
    assert "Did you mean 'cutoff'?" in lines[1]
    assert "missing, expected float" in lines[2]


def test_a_config_that_could_not_be_read_back_is_not_written():
    with pytest.raises(ValueError, match=r"this Config(.|\n)*charge: expected int, got .*int64"):
        to_dict(Config(5.0, (), charge=np.int64(3)))
    with pytest.raises(ValueError, match="cutoff: expected float, got inf"):
        to_json(Config(float("inf"), ()))


def test_text_that_is_not_a_json_object_is_refused():
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON: .*line 1 column 2"):
        from_json(Config, "{", where="a.json")
    with pytest.raises(ValueError, match="holds a JSON list, expected an object"):
        from_json(Config, "[]")
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        from_json(Config, '{"cutoff": NaN}')


def test_an_annotation_outside_the_schema_is_a_mistake_of_the_programmer():
    @dataclasses.dataclass(frozen=True)
    class Loose:
        values: list[int]

    with pytest.raises(TypeError, match="values: config fields cannot be annotated"):
        from_dict(Loose, {"values": [1]})


def test_what_is_annotated_any_is_taken_as_it_stands():
    @dataclasses.dataclass(frozen=True)
    class Open:
        fields: Mapping[str, Any]

    written = {"fields": {"a": [1, None], "b": {"c": "d"}}}
    assert to_dict(from_dict(Open, written)) == written
    with pytest.raises(ValueError, match="fields: expected .*Mapping"):
        from_dict(Open, {"fields": 3})


@pytest.fixture
def products(tmp_path, monkeypatch):
    """A package like equizoo.tensor_products whose base declares its registry."""
    package = tmp_path / "fake_products"
    package.mkdir()
    files = {
        "__init__": "",
        "_base": """
            from typing import ClassVar
            from equizoo.registry import FolderRegistry
            class Product:
                registry: ClassVar = FolderRegistry("fake_products", base="Product")
            """,
        "gaunt": """
            import dataclasses
            from fake_products._base import Product
            @dataclasses.dataclass(frozen=True)
            class Gaunt(Product):
                grid: int = 3
            """,
        "total": """
            import dataclasses
            from fake_products._base import Product
            @dataclasses.dataclass(frozen=True)
            class Total(Product):
                terms: tuple[Product, ...]
            """,
        "aged": """
            import dataclasses
            from typing import ClassVar
            from fake_products._base import Product
            @dataclasses.dataclass(frozen=True)
            class Aged(Product):
                format: ClassVar[int] = 3
                width: int
                inner: Product
            def upgrade_1_to_2(fields):
                fields["breadth"] = fields.pop("size")
                fields["inner"]["grid"] += 1
                return fields
            def upgrade_2_to_3(fields):
                return {"width": 10 * fields.pop("breadth"), **fields}
            """,
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield FolderRegistry("fake_products", base="Product")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_products"]:
        del sys.modules[name]


def test_named_fields_are_written_and_read_by_name(products):
    gaunt, total = products["gaunt"], products["total"]
    config = total((gaunt(), total((gaunt(grid=5),))))
    written = {
        "name": "total",
        "terms": [
            {"name": "gaunt", "grid": 3},
            {"name": "total", "terms": [{"name": "gaunt", "grid": 5}]},
        ],
    }
    assert to_dict(config) == written
    base = gaunt.__mro__[1]
    assert from_dict(base, written) == config == from_dict(total, written)


def test_a_bare_name_stands_for_its_defaults(products):
    assert from_dict(products["total"], {"name": "total", "terms": ["gaunt"]}).terms == (
        products["gaunt"](grid=3),
    )
    assert from_dict(products["gaunt"].__mro__[1], "gaunt") == products["gaunt"](grid=3)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            "guant",
            r"terms\[0\].name: unknown 'guant'. Did you mean 'gaunt'\? Known: aged, gaunt, total",
        ),
        ({"grid": 3}, r"terms\[0\].name: missing, expected one of aged, gaunt, total"),
        ({"name": 7}, r"terms\[0\].name: got 7 \(int\), expected one of aged"),
        ({"name": "gaunt", "grd": 3}, r"terms\[0\].grd: unknown field. Did you mean 'grid'\?"),
        ({"name": "gaunt", "format": 1}, r"terms\[0\].format: unknown field"),
        (3, r"terms\[0\]: expected the fields of Product, got 3"),
    ],
)
def test_wrong_names_and_options_are_refused(products, term, message):
    with pytest.raises(ValueError, match=message):
        from_dict(products["total"], {"name": "total", "terms": [term]})


def test_another_class_than_the_one_asked_for_is_refused(products):
    with pytest.raises(ValueError, match="name: expected 'gaunt', got 'total'"):
        from_dict(products["gaunt"], {"name": "total", "terms": []})


def test_a_class_outside_its_registry_cannot_be_written(products):
    @dataclasses.dataclass(frozen=True)
    class Stray(products["gaunt"]):
        pass

    with pytest.raises(ValueError, match="Stray is not a registered Product"):
        to_dict(Stray())


OLD = {"name": "aged", "size": 4, "inner": {"name": "gaunt", "grid": 3}}


@pytest.mark.parametrize("stamp", [{}, {"format": 1}])
def test_old_files_are_upgraded_step_by_step_and_not_altered(products, stamp):
    old = json.loads(json.dumps(OLD | stamp))
    config = from_dict(products["aged"], old)
    assert config == products["aged"](width=40, inner=products["gaunt"](grid=4))
    assert old == OLD | stamp
    second = {"name": "aged", "format": 2, "breadth": 4, "inner": "gaunt"}
    assert from_dict(products["aged"], second).width == 40


def test_new_files_carry_the_format_and_are_not_upgraded(products):
    config = products["aged"](width=40, inner=products["gaunt"](grid=4))
    written = to_dict(config)
    assert list(written.items())[:3] == [("name", "aged"), ("format", 3), ("width", 40)]
    assert from_dict(products["aged"], written) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": 4},
            "format: expected 1 to 3 for Aged, got 4. If a newer equizoo wrote the file",
        ),
        ({"format": 0}, "format: expected 1 to 3 for Aged, got 0"),
        ({"format": "1"}, "format: expected 1 to 3 for Aged, got '1'"),
        ({"size": None}, "format: fake_products.aged.upgrade_2_to_3 failed: TypeError"),
    ],
)
def test_formats_that_cannot_be_read_are_refused(products, change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(products["aged"], OLD | change)


def test_a_missing_upgrade_is_named(products, monkeypatch):
    monkeypatch.delattr(sys.modules[products["aged"].__module__], "upgrade_2_to_3")
    with pytest.raises(ValueError, match="format: fake_products.aged.upgrade_2_to_3 failed"):
        from_dict(products["aged"], OLD)


def test_class_variables_and_derived_values_are_not_written():
    @dataclasses.dataclass(frozen=True)
    class WithConstant:
        symmetry: ClassVar[str] = "O3"
        width: int = 1
        area: int = dataclasses.field(init=False, default=4)

    assert to_dict(WithConstant()) == {"width": 1}
