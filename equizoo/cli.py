"""The command line: one function per command, its signature the options (tyro), shown with rich."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from equizoo.registry import UnknownName, list_models

Json = Annotated[
    Path | None,
    tyro.conf.arg(help="also write the result as JSON to this file ('-': standard output only)"),
]
Elements = Annotated[
    tuple[str, ...], tyro.conf.arg(help="chemical symbols that the model must cover, e.g. H C O")
]
DType = Annotated[
    Literal["float32", "float64"], tyro.conf.arg(help="precision of the network; always printed")
]
_METRICS = (
    ("energy_mae_meV_per_atom", "E MAE", "meV/atom"),
    ("energy_rmse_meV", "E RMSE", "meV"),
    ("forces_mae_meV_per_A", "F MAE", "meV/Å"),
    ("forces_rmse_meV_per_A", "F RMSE", "meV/Å"),
    ("stress_mae_meV_per_A3", "stress MAE", "meV/Å³"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``equizoo`` command; exits with 2 and one clear message on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # XLA warns of its own tuning flags whenever it loads a cached program; what fails still raises.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "models": models,
                "describe": describe,
                "train": train,
                "finetune": finetune,
                "evaluate": evaluate,
                "predict": predict,
                "demo": demo,
            },
            prog="equizoo",
            description="Equivariant interatomic potentials: use, fine-tune and evaluate them.",
            args=_complete_json_flag(arguments),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (ValueError, OSError) as error:
        message = error.args[0] if isinstance(error, UnknownName) else error
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(message))}", highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def models(
    pattern: tyro.conf.Positional[str] = "*",
    elements: Elements = (),
    json: Json = None,
) -> None:
    """List the models of the zoo.

    Args:
        pattern: names to list, with * and ? as wildcards.
    """
    entries = list_models(pattern, elements=list(elements) or None)
    rows = [
        {
            "name": entry.name,
            "architecture": entry.architecture,
            "tensor_product": entry.tensor_product,
            "elements": list(entry.elements),
            "source": entry.source,
            "parameters": entry.parameters,
            "level_of_theory": entry.level_of_theory,
            "license_weights": entry.license_weights,
        }
        for entry in entries
    ]
    if _emit(rows, json):
        return
    table = Table(
        "name", "architecture", "elements", "parameters", "level of theory", "licence", "source"
    )
    for entry in entries:
        table.add_row(
            entry.name,
            entry.architecture,
            " ".join(entry.elements),
            f"{entry.parameters:,}",
            entry.level_of_theory,
            entry.license_weights,
            entry.source,
        )
    Console().print(table)


def describe(name: tyro.conf.Positional[str], json: Json = None) -> None:
    """Show what a model is, what it was trained on, and its errors.

    Args:
        name: a model of the zoo, or a model folder.
    """
    from equizoo.eval import potential

    facts = potential.describe(name)
    entry = next((entry for entry in list_models() if entry.name == name), None)
    if entry is not None:
        facts |= {"source": entry.source, "card": _card_facts(entry)}
    if not _emit(facts, json):
        _print_facts(facts)


def train(
    recipe: tyro.conf.Positional[Path],
    out: Path,
    resume: bool = False,
    epochs: int | None = None,
    json: Json = None,
) -> None:
    """Train a model from scratch after a recipe (a JSON file, see recipes/).

    Args:
        recipe: the file that says data, model and settings.
        out: folder for checkpoints, metrics, plots and the model; must not exist.
        resume: continue the run in the folder, exactly where it stopped.
        epochs: instead of the recipe's number.
    """
    from equizoo.train.recipe import load_recipe
    from equizoo.train.recipe import train as run

    loaded = load_recipe(recipe)
    if epochs is not None:
        loaded = dataclasses.replace(
            loaded, training=dataclasses.replace(loaded.training, epochs=epochs)
        )
    _use_compile_cache()
    result = run(loaded, out, resume=resume)
    if result is None:
        _print_interrupted(out)
        return
    _print_errors("errors of the trained model", {"": result.metrics})
    Console().print(f"model: {result.folder / 'model'}", highlight=False, soft_wrap=True)
    _emit({"folder": str(result.folder), "metrics": result.metrics}, json)


def finetune(
    name: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    out: Path,
    valid: str | None = None,
    num_valid: int | None = None,
    test: tuple[str, ...] = (),
    old: tuple[str, ...] = (),
    epochs: int = 40,
    learning_rate: float = 1e-3,
    batch_size: int = 5,
    reference_energies: Literal["refit", "isolated_atoms", "least_squares", "from_model"] = "refit",
    freeze: tuple[str, ...] = (),
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    seed: int = 0,
    resume: bool = False,
    json: Json = None,
) -> None:
    """Continue training a model on your own data, and report errors before and after.

    Args:
        name: a model of the zoo, or a model folder.
        data: a named data set or a file (extxyz, also .xz and .gz) with energies and forces.
        out: folder for checkpoints, metrics, plots and the model; must not exist.
        valid: data to choose the best weights by; otherwise frames split off from data.
        num_valid: how many frames to split off (default: a tenth).
        test: data sets to report errors on, before and after.
        old: data of the original kind, on which to report what was forgotten.
        epochs: passes over the data.
        learning_rate: the highest one, after warm-up.
        batch_size: structures per step.
        reference_energies: refit moves the model's to the data's level of theory.
        freeze: patterns of parameter names that do not change, e.g. 'layers.0.*'.
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
        seed: of the split and of the shuffling.
        resume: continue the run in the folder.
    """
    from equizoo.data.datasets import load_dataset
    from equizoo.eval.potential import load
    from equizoo.train.finetune import finetune as run
    from equizoo.train.finetune import finetune_training
    from equizoo.train.recipe import DataConfig

    _use_compile_cache()
    keys = _label_keys(energy_key, forces_key, stress_key)
    if valid is None and num_valid is None:
        num_valid = max(1, len(load_dataset(data, keys)) // 10)
    result = run(
        load(name),
        DataConfig(
            train=data,
            valid=valid,
            num_valid=num_valid or 0,
            split_seed=seed,
            test=test,
            keys=keys,
            reference_energies=_reference_energies(reference_energies),
        ),
        out,
        training=finetune_training(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            frozen=freeze,
            seed=seed,
        ),
        old=old,
        resume=resume,
    )
    if result is None:
        _print_interrupted(out)
        return
    _print_errors("errors before and after", {"before": result.before, "after": result.after})
    Console().print(f"model: {out / 'model'}", highlight=False, soft_wrap=True)
    _emit({"folder": str(out), "before": result.before, "after": result.after}, json)


def evaluate(
    name: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    dtype: DType = "float32",
    plot: Path | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    json: Json = None,
) -> None:
    """Errors of a model on a data set.

    Args:
        name: a model of the zoo, or a model folder.
        data: a named data set or a file (extxyz, also .xz and .gz).
        plot: write a parity plot to this PNG file.
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
    """
    from equizoo.data.datasets import load_dataset
    from equizoo.eval.evaluate import evaluate as run
    from equizoo.eval.potential import load

    _use_compile_cache()
    dataset = load_dataset(data, _label_keys(energy_key, forces_key, stress_key))
    evaluation = run(load(name), dataset, dtype=dtype, progress=json != Path("-"))
    if plot is not None:
        from equizoo.eval.plots import parity_plot

        parity_plot(evaluation, plot)
    result = evaluation.to_dict()
    if not _emit(result | result.pop("metrics"), json):
        _print_errors(f"{name}, {dtype}", {"": {dataset.name or data: evaluation.metrics}})


def predict(
    name: tyro.conf.Positional[str],
    structures: tyro.conf.Positional[Path],
    out: Path,
    dtype: DType = "float32",
    json: Json = None,
) -> None:
    """Write the energies, forces and stresses that a model predicts.

    Args:
        name: a model of the zoo, or a model folder.
        structures: a file of structures (extxyz, cif, POSCAR, ...); labels in it are ignored.
        out: extxyz file to write [eV, eV/Å, eV/Å^3]; must not exist.
    """
    from equizoo.data.readers import LabelKeys, read_structures, write_structures
    from equizoo.eval.potential import load

    _use_compile_cache()
    keys = LabelKeys(energy=None, forces=None, stress=None)
    dataset = read_structures(structures, keys, require=())
    if out.exists():
        raise ValueError(f"The output {out} exists; choose another name.")
    results = load(name).predict(dataset.structures, dtype=dtype)
    labelled = [
        dataclasses.replace(s, energy=r.energy, forces=r.forces, stress=r.stress)
        for s, r in zip(dataset.structures, results, strict=True)
    ]
    write_structures(out, labelled)
    rows = [{"energy_eV": r.energy, "num_atoms": len(r.forces)} for r in results]
    if not _emit({"model": name, "dtype": dtype, "out": str(out), "structures": rows}, json):
        Console().print(f"{len(rows)} structures -> {out} ({dtype})", highlight=False)


def demo(out: Path = Path("demo-output"), epochs: int = 12, json: Json = None) -> None:
    """Show the whole way in a few minutes on a CPU, offline: load, evaluate, fine-tune, simulate.

    Args:
        out: folder for plots and the fine-tuned model; must not exist.
        epochs: of fine-tuning.
    """
    from equizoo.train.demo import run

    _use_compile_cache()
    _emit(run(out, epochs), json)


# ---- shared ------------------------------------------------------------------------------------


def _complete_json_flag(arguments: list[str]) -> list[str]:
    """``--json`` without a path means standard output."""
    completed = []
    for index, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--json" and (not following or following[0].startswith("--")):
            completed.append("-")
    return completed


def _emit(result: Any, path: Path | None) -> bool:
    """Writes JSON if asked to; whether standard output is taken by it."""
    if path is None:
        return False
    text = json.dumps(result, indent=2, default=_plain) + "\n"
    if path == Path("-"):
        sys.stdout.write(text)
        return True
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _label_keys(energy: str | None, forces: str | None, stress: str | None):
    """Explicit label keys, or ``None`` when none was given."""
    from equizoo.data.readers import LabelKeys

    given = {"energy": energy, "forces": forces, "stress": stress}
    given = {label: key for label, key in given.items() if key is not None}
    return LabelKeys(**given) if given else None


def _reference_energies(choice: str):
    from equizoo.data.reference_energies import (
        FromModel,
        IsolatedAtoms,
        LeastSquares,
        ReferenceEnergies,
        RefitFromModel,
    )

    choices: Mapping[str, Callable[[], ReferenceEnergies]] = {
        "refit": RefitFromModel,
        "isolated_atoms": IsolatedAtoms,
        "least_squares": LeastSquares,
        "from_model": FromModel,
    }
    return choices[choice]()


def _use_compile_cache() -> None:
    """Compiled programs are kept between commands, in a folder that only the user can read."""
    import jax

    from equizoo.registry import cache_folder

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder() / "jax"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _card_facts(entry: Any) -> dict[str, Any]:
    chosen = (
        *("training_data", "training_hardware", "training_hours", "metrics", "sha256"),
        *("license_code", "license_weights", "license_data", "hub_repo", "hub_revision"),
    )
    return {name: _jsonable(getattr(entry, name)) for name in chosen}


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    card = facts.get("card", {})
    for key, value in {**facts, **card}.items():
        if key in ("card", "metrics", "training_data"):
            continue
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", _escape(_words(value)))
    for row in card.get("training_data", ()):
        table.add_row("[bold]trained on[/]", f"{row['name']} ({row['license']}): {row['citation']}")
    console = Console()
    console.print(table)
    if card.get("metrics"):
        by_split = {f"{m['dataset']} {m['split']}": m for m in card["metrics"]}
        _print_errors("errors", {"": by_split})


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_errors(title: str, stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A table of errors: one row per data set and stage."""
    shown = [
        (key, label, unit)
        for key, label, unit in _METRICS
        if any(key in metrics for stage in stages.values() for metrics in stage.values())
    ]
    table = Table(title=title, title_justify="left")
    table.add_column("data")
    if any(stages):
        table.add_column("")
    for _, label, unit in shown:
        table.add_column(f"{label}\n{unit}", justify="right")
    datasets = list(dict.fromkeys(name for stage in stages.values() for name in stage))
    for dataset in datasets:
        for stage, by_dataset in stages.items():
            metrics = by_dataset.get(dataset, {})
            cells = [f"{metrics[key]:.1f}" if key in metrics else "" for key, _, _ in shown]
            table.add_row(dataset, *([stage] if any(stages) else []), *cells)
    Console().print(table)


def _print_interrupted(out: Path) -> None:
    Console().print(f"stopped and saved; continue with --out {out} --resume", highlight=False)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
