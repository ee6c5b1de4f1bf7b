"""Imports point one way, `import equizoo` stays light, and nothing that runs data as code is used.

root <- tensor_products <- layers <- zoo <- eval <- train <- cli; data uses root, eval and train use
data. Imports inside functions count: a lazy import upward is still an import upward.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import equizoo

PACKAGE = Path(equizoo.__file__).parent
ROOT = {"structure", "graph", "neighbors", "config", "registry", "hub", "hub_client", "device"}
ROOT |= {"compile_cache", "host_memory", "whole_files"}
LAYERED = ["root", "tensor_products", "layers", "zoo", "eval", "train", "cli"]
MAY_IMPORT = {room: set(LAYERED[: i + 1]) for i, room in enumerate(LAYERED)} | {
    "data": {"root", "data"},
    "__main__": {"cli"},
}
# a group of commands in a file of its own; each of the two needs the other
MAY_IMPORT["cli_leaderboard"] = MAY_IMPORT["cli"] = MAY_IMPORT["cli"] | {"cli_leaderboard"}
for above in ("eval", "train", "cli"):
    MAY_IMPORT[above].add("data")
# Step one of converting a checkpoint: programs of their own that run in a process of their own.
OPENS_CHECKPOINTS = tuple(
    f"zoo/_convert/{kind}_dump" for kind in ("mace_torch", "equiformer_v2", "tdn")
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(tree: ast.Module, package: str) -> list[str]:
    """Dotted names that a module imports; `from a import b` gives `a.b`, relative ones resolved."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(anchor + ([base] if base else []))
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names.append("importlib.import_module()")
    return names


def modules(package: Path):
    """(parts, syntax tree, containing package) of every file; parts of zoo/mace.py: zoo, mace."""
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        container = ".".join(("equizoo", *parts[:-1]))
        yield parts, ast.parse(file.read_text("utf-8")), container


def direction_violations(package: Path) -> list[str]:
    found = []
    for parts, tree, container in modules(package):
        if parts == ("__init__",):  # the lazy public face
            continue
        room = "root" if parts[0] in ROOT else parts[0]
        if room not in MAY_IMPORT:
            found.append(f"{'/'.join(parts)}: unknown room, give it a place in MAY_IMPORT")
            continue
        for name in imported(tree, container):
            if name == "importlib.import_module()" and parts != ("registry",):
                found.append(f"{'/'.join(parts)}: import_module outside registry.py")
            top, *target = name.split(".")
            if top != "equizoo" or target == ["__version__"]:
                continue
            target_room = "root" if target and target[0] in ROOT else (target or ["equizoo"])[0]
            private = len(target) > 1 and target[1].startswith("_")
            own = len(target) > 1 and target[1] in parts[1:]
            sibling = room == target_room and room in ("tensor_products", "zoo")
            if target_room not in MAY_IMPORT[room]:
                found.append(f"{'/'.join(parts)} imports {name}")
            elif sibling and not private and not own:
                found.append(f"{'/'.join(parts)} imports its sibling {name}")
            elif room == "layers" and target_room == "tensor_products" and not private:
                found.append(f"{'/'.join(parts)} imports {name}: layers know only the interface")
    return found


def code_running_violations(package: Path) -> list[str]:
    found = []
    for parts, tree, container in modules(package):
        where = "/".join(parts)
        for name in imported(tree, container):
            if name.split(".")[0] in PICKLES or name in ("torch.load", "yaml.load"):
                found.append(f"{where} imports {name}")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call == "torch.load" and where in OPENS_CHECKPOINTS:
                continue
            if call in ("eval", "exec", "__import__", "torch.load") or (
                call.startswith("yaml.") and "load" in call and call != "yaml.safe_load"
            ):
                found.append(f"{where} calls {call}")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    found.append(f"{where} allows pickles")
    return found


def test_imports_point_one_way():
    assert direction_violations(PACKAGE) == []


def test_no_file_runs_data_as_code():
    assert code_running_violations(PACKAGE) == []


def write(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("graph.py", "from equizoo.zoo import mace"),
        ("graph.py", "def f():\n    import equizoo.layers.linear"),
        ("tensor_products/a.py", "from equizoo.tensor_products.b import B"),
        ("tensor_products/a.py", "from equizoo.tensor_products import b"),
        ("tensor_products/a.py", "from . import b"),
        ("tensor_products/a.py", "from .b import B"),
        ("tensor_products/_so3.py", "from equizoo.tensor_products.a import A"),
        ("zoo/_convert/a.py", "from ..mace import X"),
        ("zoo/mace.py", "from equizoo.zoo.tdn import TDN"),
        ("zoo/mace.py", "from equizoo.data import read_structures"),
        ("layers/a.py", "from equizoo.tensor_products.gaunt import Gaunt"),
        ("layers/a.py", "import equizoo.zoo.mace"),
        ("data/reader.py", "from equizoo.layers.radial import bessel"),
        ("data/reader.py", "from ..eval import metrics"),
        ("eval/a.py", "if True:\n    from equizoo.train.loop import fit"),
        ("train/a.py", "from equizoo import cli"),
        ("train/a.py", "from equizoo import load"),
        ("train/a.py", "import equizoo"),
        ("eval/a.py", "import importlib\nimportlib.import_module('equizoo.train')"),
        ("helpers.py", ""),
    ],
)
def test_the_direction_test_sees(tmp_path, file, text):
    assert len(direction_violations(write(tmp_path, {file: text}))) == 1


def test_the_direction_test_allows(tmp_path):
    allowed = {
        "__init__.py": "def load():\n    from equizoo.eval.potential import load",
        "registry.py": "from equizoo.config import x\nimportlib.import_module(x)",
        "tensor_products/_so3.py": "from equizoo.tensor_products._base import TensorProduct",
        "tensor_products/a.py": "from . import _so3\nfrom ._base import TensorProduct",
        "layers/a.py": "import equizoo.tensor_products._base\nfrom equizoo.layers.b import c",
        "zoo/mace.py": "from equizoo.tensor_products.gaunt import Gaunt\nimport equizoo.zoo._base",
        "zoo/_convert/a.py": "from equizoo.zoo._convert.b import table\nimport numpy.random",
        "data/a.py": "from equizoo.structure import Structure\nfrom equizoo.data.b import c",
        "eval/a.py": "from equizoo.data.b import c\nfrom equizoo.registry import MODELS",
        "train/a.py": "import equizoo.eval.metrics\nfrom equizoo.data import b",
        "cli.py": "from equizoo import __version__\nfrom equizoo.train import fit",
        "__main__.py": "from equizoo.cli import main",
    }
    assert direction_violations(write(tmp_path, allowed)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import joblib.numpy_pickle",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "import yaml\nyaml.unsafe_load('x')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_code_running_test_sees(tmp_path, text):
    assert len(code_running_violations(write(tmp_path, {"hub.py": text}))) == 1


def test_the_code_running_test_allows(tmp_path):
    text = "model.eval()\nyaml.safe_load('x')\nnp.load('x', allow_pickle=False)\nimport pickletools"
    assert code_running_violations(write(tmp_path, {"hub.py": text})) == []


def test_importing_equizoo_is_light():
    heavy = ["matplotlib", "grain", "tyro", "rich", "orbax", "torch", "tensorboardX"]
    code = f"import sys, equizoo; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
