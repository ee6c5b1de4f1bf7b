"""The command line: one function per command, its signature the options (tyro), shown with rich."""

import contextlib
import dataclasses
import json
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

from equizoo.compile_cache import use_compile_cache
from equizoo.data.reference_energies import ReferenceEnergies, RefitFromModel
from equizoo.eval.certificate import Settings
from equizoo.registry import MODELS, UnknownName, list_models, shown_elements
from equizoo.structure import EnergyReference
from equizoo.train.data_checks import DataChecks

Json = Annotated[
    Path | None,
    tyro.conf.arg(help="also write the result as JSON to this file ('-': standard output only)"),
]
Elements = Annotated[
    tuple[str, ...], tyro.conf.arg(help="chemical symbols that the model must cover, e.g. H C O")
]
DataReference = Annotated[
    Annotated[EnergyReference, tyro.conf.EnumChoicesFromValues] | None,
    tyro.conf.arg(help="what energies in OC20's databases are, whose rows do not say it"),
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


_PLAIN_CHOICES = {  # those that need no options
    name: cls()
    for name, cls in ReferenceEnergies.registry.items()
    if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))
}
_REFIT = RefitFromModel()
_SETTINGS = Settings()
PlainReferenceEnergies = Annotated[
    ReferenceEnergies,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(_PLAIN_CHOICES) + "}",
        choices=tuple(_PLAIN_CHOICES),
        instance_from_str=lambda texts: _PLAIN_CHOICES[texts[0]],
        str_from_instance=lambda choice: [ReferenceEnergies.registry.name_of(choice)],
        is_instance=lambda value: isinstance(value, ReferenceEnergies),
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``equizoo`` command; exits with 2 and one clear message on bad input."""
    # XLA warns of its own tuning flags whenever it loads a cached program; what fails still raises.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # what JAX sets when imported
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if arguments is None:
        _use_huge_pages()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    from equizoo.cli_leaderboard import leaderboard  # which builds on this module

    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "models": models,
                "describe": describe,
                "products": products,
                "doctor": doctor,
                "prepare": prepare,
                "train": train,
                "finetune": finetune,
                "evaluate": evaluate,
                "compare": compare,
                "predict": predict,
                "leaderboard": leaderboard,
                "convert": convert,
                "certify": certify,
                "publish": publish,
                "demo": demo,
                "benchmark": benchmark,
            },
            prog="equizoo",
            description="Equivariant interatomic potentials: use, fine-tune and evaluate them.",
            args=_complete_json_flag(arguments),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (ValueError, OSError, FloatingPointError) as error:  # the last: training diverged
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise SystemExit(1) from None
        message = error.args[0] if isinstance(error, UnknownName) else error
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(message))}", highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


SOURCES = {
    "bundled": "weights in the package:",
    "cached": "weights on this machine:",
    "hub": "weights on the Hugging Face Hub:",
    "checkpoint": "converted from their publisher's checkpoints when first loaded:",
}


def models(
    pattern: tyro.conf.Positional[str] = "*",
    elements: Elements = (),
    architecture: str | None = None,
    tensor_product: str | None = None,
    license: str | None = None,
    level_of_theory: str | None = None,
    dataset: str | None = None,
    max_error: tuple[str, ...] = (),
    json: Json = None,
) -> None:
    """List the models of the zoo, those that satisfy all conditions.

    Words may have * and ? as wildcards.

    Args:
        pattern: names to list.
        architecture: e.g. mace.
        tensor_product: e.g. clebsch_gordan.
        license: of the weights, e.g. MIT.
        level_of_theory: e.g. 'wB97*'.
        dataset: with errors stated on this data set, e.g. '3bpa/*'.
        max_error: with no larger error (on that data set), e.g. forces_mae_meV_per_A=20.
    """
    entries = list_models(
        pattern,
        elements=list(elements) or None,
        architecture=architecture,
        tensor_product=tensor_product,
        license=license,
        level_of_theory=level_of_theory,
        dataset=dataset,
        max_error=dict(map(_limit, max_error)),
    )
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
            "metrics": [dict(row) for row in entry.metrics],
        }
        for entry in entries
    ]
    if _emit(rows, json):
        return
    for source, title in SOURCES.items():
        here = [entry for entry in entries if entry.source == source]
        if not here:
            continue
        longest = max(len(entry.name) for entry in here)
        table = Table(  # a line each, names whole: they are what other commands want
            Column("name", no_wrap=True, min_width=longest),
            Column("elements", no_wrap=True, min_width=16),
            Column("parameters", no_wrap=True, justify="right", min_width=10),
            Column("licence", no_wrap=True, min_width=10, max_width=10),
            Column("level of theory", no_wrap=True),
            title=title,
            title_justify="left",
            box=None,
        )
        for entry in here:
            table.add_row(
                entry.name,
                shown_elements(entry.elements),
                "" if entry.parameters is None else f"{entry.parameters:,}",
                entry.license_weights,
                entry.level_of_theory,
            )
        Console().print(table)
    if not entries:
        Console().print("no model satisfies all conditions")


def describe(name: tyro.conf.Positional[str], json: Json = None) -> None:
    """Show what a model is, what it was trained on, and its errors.

    Args:
        name: a model of the zoo, or a model folder.
    """
    from equizoo.eval import potential

    entry = MODELS.get(name)
    facts = potential.describe(name)
    if entry is not None:
        facts |= {"source": entry.source, "card": _card_facts(entry)}
    if not _emit(facts, json):
        _print_facts(facts)


def products(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    l_max: tuple[int, ...] = (2,),
    json: Json = None,
) -> None:
    """List the tensor products: what each can express, what it costs, how equivariant it is.

    Every figure is measured on the product itself, in float64: of features times harmonics (0e, 1o,
    2e, ...) up to a degree, into every irrep up to that degree. What they cost in time is for
    `equizoo benchmark tensor-products`.

    Args:
        names: products, as in `equizoo.registry.TENSOR_PRODUCTS` (default: all).
        l_max: highest degrees.
    """
    import jax

    from equizoo.tensor_products.analysis.properties import table

    with jax.enable_x64(True):
        found = [table(degree, names) for degree in l_max]
    result = {
        "rows": [dataclasses.asdict(row) for rows, _ in found for row in rows],
        "problems": [
            {"l_max": degree, "product": name, "problem": problem}
            for degree, (_, problems) in zip(l_max, found, strict=True)
            for name, problem in problems.items()
        ],
    }
    if _emit(result, json):
        return
    columns = "l_max", "couplings", "weights", "expressivity", "defect", "flops", "bytes"
    shown = Table(
        Column("product", no_wrap=True),
        *columns,
        caption="flops and bytes: for each item and channel, float32",
    )
    for row in result["rows"]:
        shown.add_row(
            row["product"],
            str(row["l_max"]),
            f"{row['contained']} of {row['allowed']}",
            str(row["num_weights"]),
            str(row["expressivity"]),
            f"{row['defect']:.0e}",
            f"{row['flops']:,}",
            f"{row['bytes']:,}",
        )
    Console().print(shown)
    for problem in result["problems"]:
        Console().print(f"{problem['product']}, l_max {problem['l_max']}: {problem['problem']}")


def doctor(
    data: tyro.conf.Positional[str],
    against: tuple[str, ...] = (),
    model: str | None = None,
    cutoff: float | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    energy_reference: Annotated[EnergyReference | None, tyro.conf.EnumChoicesFromValues] = None,
    json: Json = None,
) -> None:
    """Look for what is wrong with a data set before training on it.

    Labels that are not read, zeros that constraints left behind, units, signs and component orders
    (from frames near each other), reference energies, distances, net forces, outliers, duplicates
    (by symmetry too), what does not suit a model. Exits with 1 if there are errors, else with 0.

    Args:
        data: a named data set or a file (extxyz, also .xz and .gz).
        against: test data, none of which may be in data.
        model: a model of the zoo, or a model folder, that the data are for.
        cutoff: within which atoms see each other [Å] (default: the model's, else 5).
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
        energy_reference: what the energies in the file are (default: as registered, else total).
    """
    import warnings

    from equizoo.data.datasets import load_dataset
    from equizoo.data.doctor import examine
    from equizoo.data.readers import LabelKeys
    from equizoo.eval.doctor import compare_with_model, model_facts

    keys = _label_keys(energy_key, forces_key, stress_key)

    def read(name: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unread labels: found below
            return load_dataset(
                name, keys, require=(), on_bad="skip", data_energy_reference=energy_reference
            )

    dataset = read(data)
    facts = None if model is None else model_facts(model)
    diagnosis = examine(
        dataset,
        against=[read(name) for name in against],
        keys=keys or LabelKeys(),
        cutoff=cutoff or (5.0 if facts is None else facts.cutoff),
    )
    if facts is not None:
        diagnosis = diagnosis.with_findings(compare_with_model(dataset, facts))
    if not _emit(diagnosis.to_dict(), json):
        _print_diagnosis(diagnosis, model)
    if diagnosis.errors:
        raise SystemExit(1)


def prepare(
    sources: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    workers: int = 1,
    cutoff: float = 5.0,
    max_neighbors: int | None = None,
    store_neighbors: bool = False,
    frames_per_shard: int = 4096,
    energy_reference: Annotated[EnergyReference | None, tyro.conf.EnumChoicesFromValues] = None,
    data_energy_reference: DataReference = None,
    adsorption_references: Path | None = None,
    level_of_theory: str | None = None,
    target: Literal["frame", "relaxed"] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    json: Json = None,
) -> None:
    """Turn data of any size into a folder that training reads from disk, frame by frame.

    The folder can then be given wherever a data set can: to train (in a recipe), finetune,
    evaluate, predict. It holds the frames in compressed shards, and dataset.json, which says what
    is in them: elements, labels, reference energies by least squares, neighbours, checksums.

    After an interruption, even kill -9 or a power cut, the same command goes on from there.

    Args:
        sources: named data sets, patterns of names, files (extxyz, also .xz and .gz; traj, db, h5
            of MACE, ...), and folders or databases of OC20 and OC22 (extxyz.xz, lmdb, aselmdb).
        out: folder to write.
        workers: processes that read and write at the same time.
        cutoff: within which neighbours are counted [Å]; best that of the model to be trained.
        max_neighbors: count (and store) only so many, the nearest, as some models see them.
        store_neighbors: also store the neighbour lists, for models with this very cutoff; larger
            files, less work while training.
        frames_per_shard: frames of a source that make one file.
        energy_reference: what energies are measured against; those of OC20 are converted to it.
        adsorption_references: oc20_ref.pkl, for converting where frames have no reference.
        level_of_theory: of all sources, where these do not say.
        target: of OC20 and OC22: a frame's own energy and forces, or the relaxed energy.
        on_bad: what to do with a faulty frame: stop, or leave it out and count it.
        energy_key: label of the energies in the files [eV] (default: energy).
        forces_key: label of the forces in the files [eV/Å] (default: forces).
        stress_key: label of the stresses in the files [eV/Å^3] (default: stress).
    """
    from equizoo.data.catalyst_frames import Target
    from equizoo.data.prepare import prepare as run
    from equizoo.data.prepare import summary
    from equizoo.data.statistics import NeighborRule
    from equizoo.neighbors import NeighborLimit

    limit = None if max_neighbors is None else NeighborLimit(max_neighbors)
    with _telling() as tell:
        dataset = run(
            sources,
            out,
            keys=_label_keys(energy_key, forces_key, stress_key),
            energy_reference=energy_reference,
            data_energy_reference=data_energy_reference,
            adsorption_references=adsorption_references,
            level_of_theory=level_of_theory,
            target=None if target is None else Target(target),
            rule=NeighborRule(cutoff, limit),
            store_neighbors=store_neighbors,
            frames_per_shard=frames_per_shard,
            workers=workers,
            on_bad=on_bad,
            progress=lambda shards, frames: tell(
                f"prepare {out}: {frames:,} frames in {shards} shards"
            ),
        )
    assert dataset.statistics is not None
    facts = summary(dataset.statistics) | {"folder": str(out)}
    if not _emit(facts, json):
        _print_facts(facts)
        Console().print(_escape(str(dataset.report)), highlight=False, soft_wrap=True)


def train(
    recipe: tyro.conf.Positional[Path],
    out: Path,
    resume: bool = False,
    epochs: int | None = None,
    data_checks: Annotated[DataChecks | None, tyro.conf.EnumChoicesFromValues] = None,
    workers: int = 0,
    host: str | None = None,
    wandb: str | None = None,
    json: Json = None,
) -> None:
    """Train a model from scratch after a recipe (a JSON file, see recipes/).

    Args:
        recipe: the file that says data, model and settings.
        out: folder for checkpoints, metrics, plots and the model; must not exist.
        resume: continue the run in the folder, exactly where it stopped.
        epochs: instead of the recipe's number.
        data_checks: what to do about errors in the data (default: the recipe's word, or refuse).
        workers: processes that read prepared data ahead, instead of threads; results are the same.
        host: the place of this process among several that train one model: auto, as SLURM, Open
            MPI, Kubernetes or a TPU pod says, or INDEX/NUMBER@ADDRESS:PORT of the first.
        wandb: project of Weights & Biases to show the run in, beside TensorBoard.
    """
    from equizoo.data.pipeline import Reading
    from equizoo.train.hosts import is_first
    from equizoo.train.recipe import load_recipe
    from equizoo.train.recipe import train as run

    _join_hosts(host)
    loaded = load_recipe(recipe)
    if data_checks is not None:
        loaded = dataclasses.replace(
            loaded, data=dataclasses.replace(loaded.data, checks=data_checks)
        )
    if epochs is not None:
        loaded = dataclasses.replace(
            loaded, training=dataclasses.replace(loaded.training, epochs=epochs)
        )
    use_compile_cache()
    result = run(
        loaded, out, resume=resume, reading=Reading(workers=workers), boards=_boards(wandb)
    )
    if not is_first():
        return
    if result is None:
        _print_interrupted(out)
        return
    if not _emit({"folder": str(out), "metrics": result.metrics}, json):
        _print_errors("errors of the trained model", {"": result.metrics})
        _print_model(out)


def finetune(
    name: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    out: Path,
    valid: str | None = None,
    num_valid: int | None = None,
    num_train: int | None = None,
    test: tuple[str, ...] = (),
    num_test: int | None = None,
    old: tuple[str, ...] | None = None,
    replay: str | None = None,
    replay_frames: int | None = None,
    replay_labels: Literal["model", "data"] = "model",
    new_elements: tuple[str, ...] = (),
    epochs: int | None = None,
    learning_rate: float | None = None,
    stress_weight: float = 0.0,
    batch_size: int = 5,
    reference_energies: PlainReferenceEnergies = _REFIT,
    freeze: tuple[str, ...] = (),
    low_rank: int | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    data_energy_reference: DataReference = None,
    data_checks: Annotated[DataChecks, tyro.conf.EnumChoicesFromValues] = DataChecks.REFUSE,
    seed: int = 0,
    resume: bool = False,
    workers: int = 0,
    microbatches: int = 1,
    host: str | None = None,
    wandb: str | None = None,
    json: Json = None,
) -> None:
    """Continue training a model on your own data, and report errors before and after.

    Args:
        name: a model of the zoo, or a model folder.
        data: a named data set, a file (extxyz, also .xz and .gz) with energies and forces, or a
            folder made by `equizoo prepare`.
        out: folder for checkpoints, metrics, plots and the model; must not exist.
        valid: data to choose the best weights by; otherwise frames split off from data.
        num_valid: how many frames to split off (default: a tenth).
        num_train: how many of the others to train on, at random (default: all); a larger number
            has those of a smaller one, for curves of error against data.
        test: data sets to report errors on, before and after.
        num_test: how many frames of each of them at most, at random (default: all).
        old: data of the original kind, on which to report what was forgotten (default: the first
            on the model's card that is on this machine, else frames of --replay not replayed).
        replay: data of the original kind to go on training on, under a head of their own, so that
            less is forgotten.
        replay_frames: how many of them, each unlike those before it (default: all).
        replay_labels: those that the model gives them, or their own (data).
        new_elements: that the data have and the model lacks, each with one of the model's to start
            like, e.g. Si=C P=N.
        epochs: passes over the data (default: 40, or more that make 400 steps).
        learning_rate: the highest one, after warm-up (default: 0.004; 0.012 with --low-rank).
        stress_weight: of squared errors of the stress [eV/Å^3] in the loss, where energies per atom
            have 100 and forces 10.
        batch_size: structures per step.
        reference_energies: by default the model's, moved to the data's level of theory.
        freeze: patterns of parameter names that do not change, e.g. 'layers.0.*'.
        low_rank: let matrices change by this rank only, and nothing else (LoRA), e.g. 8.
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
        data_checks: what to do about errors that `equizoo doctor` finds in data.
        seed: of the split and of the shuffling.
        resume: continue the run in the folder.
        workers: processes that read prepared data ahead, instead of threads; results are the same.
        microbatches: parts of a batch, which devices share, else one after the other.
        host: the place of this process among several that train one model: auto, as SLURM, Open
            MPI, Kubernetes or a TPU pod says, or INDEX/NUMBER@ADDRESS:PORT of the first.
        wandb: project of Weights & Biases to show the run in, beside TensorBoard.
    """
    from equizoo.data.pipeline import Reading
    from equizoo.eval.potential import load
    from equizoo.train.finetune import finetune as run
    from equizoo.train.finetune_settings import FinetuneSettings
    from equizoo.train.hosts import is_first
    from equizoo.train.parametrization import LowRank
    from equizoo.train.recipe import DataConfig
    from equizoo.train.replay import LabelsFrom, Replay

    _join_hosts(host)
    use_compile_cache()
    result = run(
        load(name),
        DataConfig(
            train=data,
            valid=valid,
            num_valid=num_valid,
            num_train=num_train,
            split_seed=seed,
            test=test,
            num_test=num_test,
            keys=_label_keys(energy_key, forces_key, stress_key),
            data_energy_reference=data_energy_reference,
            reference_energies=reference_energies,
            checks=data_checks,
        ),
        out,
        training=FinetuneSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            stress_weight=stress_weight,
            batch_size=batch_size,
            microbatches=microbatches,
            frozen=freeze,
            low_rank=None if low_rank is None else LowRank(rank=low_rank),
            seed=seed,
        ),
        old=old,
        replay=None
        if replay is None
        else Replay(data=replay, count=replay_frames, labels=LabelsFrom(replay_labels), seed=seed),
        new_elements=_pairs_of_elements(new_elements),
        resume=resume,
        reading=Reading(workers=workers),
        boards=_boards(wandb),
    )
    if not is_first():
        return
    if result is None:
        _print_interrupted(out)
        return
    errors = {"before": result.before, "after": result.after}
    if not _emit({"folder": str(out)} | errors, json):
        _print_errors("errors before and after", errors)
        _print_model(out)


def _pairs_of_elements(given: tuple[str, ...]) -> dict[str, str]:
    """``("Si=C",)`` as a mapping."""
    pairs = [pair.split("=") for pair in given]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--new-elements is {' '.join(given)}, expected pairs such as Si=C P=N.")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"--new-elements is {' '.join(given)}, with one new element twice.")
    return dict(pairs)


def evaluate(
    name: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    dtype: DType = "float32",
    plot: Path | None = None,
    card: bool = False,
    speed: bool = False,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    data_energy_reference: DataReference = None,
    json: Json = None,
) -> None:
    """Errors of a model on a data set.

    Args:
        name: a model of the zoo, or a model folder.
        data: a named data set, a file (extxyz, also .xz and .gz) or a prepared folder.
        plot: write a parity plot to this PNG file.
        card: write the errors (and the speed) into the model's card, with a parity plot.
        speed: also measure what energies and forces cost on this machine; leave it alone meanwhile.
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
    """
    from equizoo.data.datasets import load_dataset
    from equizoo.eval.evaluate import evaluate as run
    from equizoo.eval.potential import load

    use_compile_cache()
    keys = _label_keys(energy_key, forces_key, stress_key)
    dataset = load_dataset(data, keys, data_energy_reference=data_energy_reference)
    potential = load(name)
    if card:
        _require_card(name, potential)
    evaluation = run(potential, dataset, dtype=dtype, progress=json != Path("-"))
    measured = None
    if speed:
        from equizoo.eval.speed import measure_speed

        measured = measure_speed(potential, dataset.structures, dtype=dtype)
    if card:
        from equizoo.eval.card import update_card

        update_card(potential, evaluation=evaluation, speed=measured)
    if plot is not None:
        from equizoo.eval.plots import parity_plot

        parity_plot(evaluation, plot)
    result = evaluation.to_dict() | ({} if measured is None else {"speed": measured._asdict()})
    if not _emit(result | result.pop("metrics"), json):
        _print_errors(f"{name}, {dtype}", {"": {dataset.name or data: evaluation.metrics}})
        if measured is not None:
            _print_facts(measured._asdict())


def _require_card(name: str, potential: Any) -> None:
    """Before much is measured: a card of a released model, and of these very weights."""
    from equizoo.eval.card import require_card
    from equizoo.hub import WEIGHTS, sha256_of
    from equizoo.registry import find_model_folder

    require_card(potential.name, sha256_of(find_model_folder(name) / WEIGHTS))


def compare(
    a: tyro.conf.Positional[str],
    b: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    also: tuple[str, ...] = (),
    dtype: DType = "float32",
    speed: bool = False,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    data_energy_reference: DataReference = None,
    json: Json = None,
) -> None:
    """Errors of two or more models on the same data, side by side, structure by structure.

    Args:
        a: a model of the zoo, or a model folder; the others are compared with it.
        b: another one.
        data: a named data set or a file (extxyz, also .xz and .gz).
        also: further models.
        speed: also measure what energies and forces cost on this machine; leave it alone meanwhile.
        energy_key: label of the energies in the file [eV] (default: energy).
        forces_key: label of the forces in the file [eV/Å] (default: forces).
        stress_key: label of the stresses in the file [eV/Å^3] (default: stress).
    """
    from equizoo.data.datasets import load_dataset
    from equizoo.eval.compare import compare as run
    from equizoo.eval.potential import load

    use_compile_cache()
    keys = _label_keys(energy_key, forces_key, stress_key)
    dataset = load_dataset(data, keys, data_energy_reference=data_energy_reference)
    potentials = {name: load(name) for name in (a, b, *also)}
    comparison = run(potentials, dataset, dtype=dtype, speed=speed, progress=json != Path("-"))
    if not _emit(comparison.to_dict(), json):
        _print_comparison(comparison)


# What ASE calls results of a calculator: not to stand beside those of another.
_OLD_RESULTS = ("energy", "free_energy", "energies", "forces", "stress", "stresses", "virial")


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
        structures: a file of structures (extxyz, cif, POSCAR, ...) or a folder made by `equizoo
            prepare`; labels in it are ignored.
        out: extxyz file to write [eV, eV/Å, eV/Å^3]; must not exist.
    """
    from equizoo.data.prepared import is_prepared, open_prepared
    from equizoo.data.readers import LabelKeys, read_structures, write_structures
    from equizoo.eval.potential import load

    use_compile_cache()
    keys = LabelKeys(energy=None, forces=None, stress=None)
    if is_prepared(structures):
        dataset = open_prepared(structures)
    else:
        dataset = read_structures(structures, keys, require=())
    if out.exists():
        raise ValueError(f"The output {out} exists; choose another name.")
    results = load(name).predict_stream(dataset.structures, dtype=dtype)
    rows: list[dict[str, Any]] = []

    def labelled() -> Iterator[Any]:  # one after the other: they may be more than memory holds
        for s, r in zip(dataset.structures, results, strict=True):
            rows.append({"energy_eV": r.energy, "num_atoms": len(r.forces)})
            info = {key: value for key, value in s.info.items() if key not in _OLD_RESULTS}
            yield r.label(dataclasses.replace(s, info=info))

    write_structures(out, labelled())
    if not _emit({"model": name, "dtype": dtype, "out": str(out), "structures": rows}, json):
        Console().print(f"{len(rows)} structures -> {out} ({dtype})", highlight=False)


_OF_CHECKPOINT = "as in the checkpoint"


def _refuse_for_released(name: str, given: Mapping[str, bool]) -> None:
    """Raises ``ValueError`` for options that only files have."""
    if options := ", ".join(f"--{option}" for option, is_given in given.items() if is_given):
        raise ValueError(
            f"{options}: for files alone; {name} is a released checkpoint, converted as its card "
            "says. Fetch its file to convert it otherwise (its address: equizoo describe)."
        )


def convert_mace_torch(
    source: tyro.conf.Positional[str],
    out: Path | None = None,
    trust: bool = False,
    accept_license: str | None = None,
    python: Path | None = None,
    dump_only: bool = False,
    elements: tuple[str, ...] = (),
    level_of_theory: str = _OF_CHECKPOINT,
    json: Json = None,
) -> None:
    """Models of mace-torch (.model), and its foundation models by name.

    Opening a .model file runs code that it brings: consent with --trust. That step needs
    mace-torch; it can be done elsewhere (--dump-only), and its folder given as the source.

    Args:
        source: a .model file, a folder made with --dump-only, or a released checkpoint by name.
        out: folder for the model (or the dump); must not exist. A released checkpoint goes to
            the cache without it, where 'equizoo evaluate NAME' and the rest find it.
        trust: yes, run the code in the checkpoint.
        accept_license: of a released checkpoint whose licence has terms to agree to.
        python: an interpreter that has mace-torch (default: EQUIZOO_TORCH_PYTHON, or this one).
        dump_only: write plain arrays and JSON, to be converted without mace-torch.
        elements: keep these alone (chemical symbols).
        level_of_theory: that of the data it was trained on.
    """
    from equizoo.eval import convert_mace_torch as to
    from equizoo.eval.checkpoints import convert_released

    use_compile_cache()
    if source in MODELS:
        own_level = level_of_theory != _OF_CHECKPOINT
        _refuse_for_released(source, {"dump-only": dump_only, "level-of-theory": own_level})
    if dump_only:
        to.dump_mace_torch(source, _required(out, "dump"), trust=trust, python=python)
        _show_folder({}, out, json)
        return
    if source in MODELS:
        folder = convert_released(
            source,
            "mace-torch",
            out,
            elements=elements,
            trust=trust,
            accept_license=accept_license,
            python=python,
        )
    else:
        folder = _required(out, "model")
        to.convert_mace_torch(
            source,
            trust=trust,
            python=python,
            elements=elements,
            level_of_theory=level_of_theory,
        ).save(folder)
    _show_converted(folder, json)


def convert_equiformer_v2(
    source: tyro.conf.Positional[str],
    out: Path | None = None,
    energy_reference: Annotated[
        Annotated[EnergyReference, tyro.conf.EnumChoicesFromValues] | None,
        tyro.conf.arg(
            help="what energies are measured against: adsorption for OC20, total for OC22; a "
            "released checkpoint's card says it"
        ),
    ] = None,
    raw: bool = False,
    python: Path | None = None,
    dump_only: bool = False,
    elements: tuple[str, ...] = (),
    level_of_theory: str = _OF_CHECKPOINT,
    json: Json = None,
) -> None:
    """EquiformerV2 of fairchem 1.x (.pt), and those released for OC20 and OC22 by name.

    Opening the file needs torch, runs no code in it, and can be done elsewhere (--dump-only), its
    folder then given as the source.

    Args:
        source: a .pt file, a folder made with --dump-only, or a released checkpoint by name.
        out: folder for the model (or the dump); must not exist. A released checkpoint goes to
            the cache without it, where 'equizoo evaluate NAME' and the rest find it.
        raw: weights of the last step, not their moving average.
        python: an interpreter that has torch (default: EQUIZOO_TORCH_PYTHON, or this one).
        dump_only: write plain arrays and JSON, to be converted without torch.
        elements: keep these alone (chemical symbols).
        level_of_theory: that of the data it was trained on.
    """
    from equizoo.eval import convert_equiformer_v2 as to
    from equizoo.eval.checkpoints import convert_released

    use_compile_cache()
    if source in MODELS:
        given = {
            "dump-only": dump_only,
            "raw": raw,
            "level-of-theory": level_of_theory != _OF_CHECKPOINT,
            "energy-reference": energy_reference is not None,
        }
        _refuse_for_released(source, given)
    if dump_only:
        to.dump_equiformer_v2(source, _required(out, "dump"), raw=raw, python=python)
        _show_folder({}, out, json)
        return
    if source in MODELS:
        folder = convert_released(source, "equiformer-v2", out, elements=elements, python=python)
    else:
        folder = _required(out, "model")
        if energy_reference is None:
            raise ValueError(
                "The checkpoint does not say what its energies are measured against; give "
                "--energy-reference adsorption (OC20) or total (OC22)."
            )
        to.convert_equiformer_v2(
            Path(source),
            energy_reference=energy_reference,
            raw=raw,
            python=python,
            elements=elements,
            level_of_theory=level_of_theory,
        ).save(folder)
    _show_converted(folder, json)


def convert_tdn(
    source: tyro.conf.Positional[Path],
    out: Path,
    factors: Path | None = None,
    cutoff: float = 4.5,
    avg_num_nodes: float = 36.6,
    avg_num_neighbors: float = 18.6,
    energies: Literal["per_atom", "total"] = "per_atom",
    forces: Literal["direct", "gradient"] = "direct",
    references: Path | None = None,
    energy_reference: Annotated[
        EnergyReference, tyro.conf.EnumChoicesFromValues
    ] = EnergyReference.TOTAL,
    raw: bool = False,
    python: Path | None = None,
    dump_only: bool = False,
    level_of_theory: str = "as in the checkpoint",
    json: Json = None,
) -> None:
    """TDN of divelab/AIRS (.pth): a training run's checkpoint, or the weights of its best epoch.

    Opening the file needs torch, runs no code in it, and can be done elsewhere (--dump-only), its
    folder then given as the source. A checkpoint does not say what its run was; the defaults are
    those of PubChemQCR-S.

    Args:
        source: a .pth file, or a folder made with --dump-only.
        out: folder for the model (or the dump); must not exist.
        factors: the file of the run's cache, tmp/cp_init_*.pt, for a checkpoint without factors.
        cutoff: in Å.
        avg_num_nodes: atoms per structure, a constant of the original's source.
        avg_num_neighbors: neighbours per atom, likewise.
        energies: what the outputs of atoms sum to; per_atom as trained on PubChemQCR.
        forces: of the head, or minus the gradient of the energy, as they were trained.
        references: JSON from chemical symbols to the energies [eV] of single atoms that the
            model's are measured against (default: PubChemQCR's); the model is for these elements.
        energy_reference: what energies are measured against, once those of atoms are added.
        raw: weights of the last step, not their moving average.
        python: an interpreter that has torch (default: EQUIZOO_TORCH_PYTHON, or this one).
        dump_only: write plain arrays and JSON, to be converted without torch.
        level_of_theory: that of the data it was trained on.
    """
    from equizoo.eval import convert_tdn as to

    use_compile_cache()
    if dump_only:
        to.dump_tdn(source, out, factors=factors, raw=raw, python=python)
        _show_folder({}, out, json)
        return
    run = to.run_of(
        cutoff=cutoff,
        avg_num_nodes=avg_num_nodes,
        avg_num_neighbors=avg_num_neighbors,
        energies=energies,
        forces=forces,
        references=references,
    )
    to.convert_tdn(
        source,
        run,
        factors=factors,
        raw=raw,
        python=python,
        energy_reference=energy_reference,
        level_of_theory=level_of_theory,
    ).save(out)
    _show_converted(out, json)


def convert(
    checkpoint: Annotated[
        Annotated[None, tyro.conf.subcommand("mace-torch", constructor=convert_mace_torch)]
        | Annotated[None, tyro.conf.subcommand("equiformer-v2", constructor=convert_equiformer_v2)]
        | Annotated[None, tyro.conf.subcommand("tdn", constructor=convert_tdn)],
        tyro.conf.OmitSubcommandPrefixes,
    ],
) -> None:
    """Turn a checkpoint of another code into a model folder, equal to rounding."""


def _required(out: Path | None, what: str) -> Path:
    if out is None:
        raise ValueError(f"--out is missing: the folder to write the {what} to.")
    return out


def _show_converted(folder: Path, json: Path | None) -> None:
    from equizoo.eval.potential import load

    _show_folder(load(folder).describe(), folder, json)


def _show_folder(facts: Mapping[str, Any], folder: Path | None, json: Path | None) -> None:
    facts = {**facts, "folder": str(folder)}
    if not _emit(facts, json):
        _print_facts(facts)


def certify(
    name: tyro.conf.Positional[str],
    structures: str | None = None,
    settings: Settings = _SETTINGS,
    card: bool = False,
    json: Json = None,
) -> None:
    """Put what a model claims to the test: symmetry, derivatives, precision, stable dynamics.

    Exits with 1 when a claim does not stand. What was run is part of the result.

    Args:
        name: a model of the zoo, or a model folder.
        structures: a data set or file that the model is made for (default: the first of the data
            sets on its card that is here or can be downloaded, else NAME/replay); without any,
            dynamics is left out.
        settings: how much is done.
        card: write the certificate into the model's card.
    """
    from equizoo.config import to_dict
    from equizoo.eval import card as cards
    from equizoo.eval.certify import certify as run
    from equizoo.eval.potential import load
    from equizoo.hub import WEIGHTS, sha256_of
    from equizoo.registry import find_model_folder

    use_compile_cache()
    potential = load(name)
    if card:
        _require_card(name, potential)
    source, frames = cards.structures_for(name, structures)
    with _telling() as tell:
        certificate = run(
            potential,
            frames,
            source=source,
            sha256=sha256_of(find_model_folder(name) / WEIGHTS),
            settings=settings,
            progress=lambda what: tell(f"certify {name}: {what}"),
        )
    if card:
        cards.update_card(potential, certificate=certificate)
    if not _emit(to_dict(certificate), json):
        _print_certificate(certificate)
    if certificate.failed:
        raise SystemExit(1)


def publish(
    name: tyro.conf.Positional[str],
    repo: str,
    tag: str | None = None,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    pin: bool = False,
    json: Json = None,
) -> None:
    """Put a model on the Hugging Face Hub: weights, configuration, golden outputs, card, images.

    Needs a token that may write there (`hf auth login`, or HF_TOKEN). What is there already is not
    sent again; everything goes up in one commit.

    Args:
        name: a model of the zoo, or a model folder.
        repo: organisation/name; made if it is not there.
        tag: name the commit, e.g. v1.0.
        private: make a new repository private.
        branch: instead of main; made if it is not there.
        create_pr: propose it as a pull request.
        parent_commit: write nothing unless the branch is still at this commit.
        message: of the commit.
        dry_run: only list what would be sent.
        pin: write repository and commit into the model's card, so that its name leads there.
    """
    from equizoo.eval import publish as to

    use_compile_cache()
    if dry_run:
        sizes = {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in to.repository_files(name).items()
        }
        if not _emit({"repo": repo, "files": sizes}, json):
            lines = [f"{size:>12,}  {path}" for path, size in sizes.items()]
            Console().print("\n".join(lines), highlight=False, soft_wrap=True)
        return
    if pin:
        to.require_pinnable(name, create_pr)  # not only when it is published
    upload = to.publish(
        name,
        repo,
        tag=tag,
        private=private or None,
        branch=branch,
        create_pr=create_pr,
        parent_commit=parent_commit,
        message=message,
    )
    facts = upload._asdict() | ({"card": str(to.pin(name, upload))} if pin else {})
    if not _emit(facts, json):
        _print_facts(facts | {"load": f'equizoo.load("hf-hub:{repo}@{upload.commit}")'})


def demo(out: Path = Path("demo-output"), epochs: int = 8, json: Json = None) -> None:
    """Show the whole way in a few minutes on a CPU, offline: load, evaluate, fine-tune, simulate.

    Args:
        out: folder for plots and the fine-tuned model; must not exist.
        epochs: of fine-tuning.
    """
    from equizoo.train.demo import run

    use_compile_cache()
    # what is told does not mix with JSON on standard output
    console = Console(highlight=False, stderr=json == Path("-"))
    _emit(run(out, epochs, console), json)


def benchmark_tensor_products(
    out: Path,
    protocol: Literal["sweep", "side-by-side", "auto"] = "sweep",
    variants: tuple[str, ...] = (),
    modes: tuple[Literal["SISO", "SIMO", "MIMO"], ...] = (),
    comparisons: tuple[
        Literal["edge", "edge-weighted", "channelwise", "channelwise-summed", "convolve"], ...
    ] = (),
    l_max: tuple[int, ...] = (),
    channels: tuple[int, ...] = (),
    batch: tuple[int, ...] = (),
    cells: int = 3,
    seconds: float | None = None,
    repeats: tuple[int, int] = (10, 100),
    time_limit: float = 60.0,
    memory_limit: float = 8.0,
    json: Json = None,
) -> None:
    """Measure what equivariant products cost on this machine, and draw it.

    The protocol 'sweep' times every product over degrees, channels and batches, forward and with
    derivatives, as the paper The Price of Freedom does; 'side-by-side' times ours and those of
    other installed libraries (pip install 'equizoo[peers]') in turns on equal arguments; 'auto'
    finds the fastest of the equal forms of the Clebsch-Gordan product for this device and writes
    auto_table.json, for the field 'table' of the product 'auto'. Leave the machine alone meanwhile.
    Points are written one by one; the same command continues a file that was left unfinished, and
    adds other sizes to it. What is not measured has a row with the reason.

    Args:
        out: folder for the CSV file and the figures.
        protocol: ours over sizes, ours beside others', or the fastest of equal ones.
        variants: products, as in `equizoo.registry.TENSOR_PRODUCTS` (default: all).
        modes: of the sweep: which irreps are single (default: all).
        comparisons: side by side: what is computed (default: all).
        l_max: highest degrees of the factors (default: 1 to 10, side by side 1 to 4).
        channels: copies of each irrep (default: 16, side by side 64).
        batch: items (default: 625, which with 16 channels makes ten thousand products, side by
            side 1000).
        cells: side by side: the convolution's structure along each axis, 8 atoms to a cell.
        seconds: of timing for each point (default: 0.5, side by side 1), within repeats.
        repeats: fewest and most calls of a point.
        time_limit: in seconds, to bind, compile or time a point; larger ones are then left out.
        memory_limit: in GB, of arguments, results and temporaries of a point.
    """
    from equizoo.eval.benchmark import Limits, SideBySide, Sweep, run
    from equizoo.eval.benchmark_auto import auto_plan, write_choices
    from equizoo.eval.benchmark_plots import figures

    sweep = protocol == "sweep"
    limits = Limits((0.5 if sweep else 1.0) if seconds is None else seconds, repeats)
    limits = dataclasses.replace(limits, time=time_limit, memory=memory_limit)
    options = dict(variants=variants, l_max=l_max, channels=channels, batch=batch)
    options |= dict(modes=modes) if sweep else dict(comparisons=comparisons)
    given: dict[str, Any] = {name: value for name, value in options.items() if value}
    plans: dict[str, Callable[[], Sweep | SideBySide]] = {
        "sweep": lambda: Sweep(**given, limits=limits),
        "side-by-side": lambda: SideBySide(**given, limits=limits, cells=cells),
        "auto": lambda: dataclasses.replace(auto_plan(limits), **given, cells=cells),
    }
    file, rows = run(plans[protocol](), out, _ignore if json == Path("-") else _print_row)
    reasons = Counter(row.skipped for row in rows if row.skipped)
    result: dict[str, Any] = {
        "file": str(file),
        "points": len(rows) - reasons.total(),
        "skipped": dict(reasons.most_common()),
        "figures": [str(figure) for figure in figures(rows, out)],
    }
    if protocol == "auto":
        result["table"] = str(write_choices(rows, out))
    if not _emit(result, json):
        _print_benchmark(result)


def benchmark_train(
    recipe: tyro.conf.Positional[Path],
    out: Path,
    batch_sizes: tuple[int, ...] = (),
    microbatches: tuple[int, ...] = (),
    workers: tuple[int, ...] = (0,),
    epochs: int = 3,
    json: Json = None,
) -> None:
    """Measure how fast a recipe trains on this machine, and how long its devices wait for data.

    Every combination of batch size, microbatches and reading processes is trained for a few epochs
    from scratch, of which the last counts: structures per second of steps (no validation, no
    checkpoints), and the share of that time in which no step ran. Leave the machine alone
    meanwhile. XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices of a CPU.

    Args:
        recipe: the file that says data, model and settings.
        out: folder for train.csv and train.png.
        batch_sizes: structures per step (default: the recipe's).
        microbatches: parts of a batch, which devices share (default: the recipe's).
        workers: processes that read prepared data ahead; 0: threads.
        epochs: of each run.
    """
    from equizoo.train.benchmark import benchmark_training
    from equizoo.train.recipe import load_recipe

    use_compile_cache()
    found = benchmark_training(load_recipe(recipe), out, batch_sizes, microbatches, workers, epochs)
    rows = [dataclasses.asdict(row) for row in found]
    if _emit({"folder": str(out), "rows": rows}, json):
        return
    table = Table("batch", "parts", "devices", "workers", "structures/s", "idle", "padding")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("batch_size", "microbatches", "devices", "workers")),
            f"{row['structures_per_s']:.1f}",
            f"{row['idle_share']:.1%}",
            f"{row['padding_nodes']:.0%}, {row['padding_edges']:.0%}",
        )
    table.caption = "parts: microbatches; padding: of atoms, of edges"
    Console().print(table)
    _print_facts({"file": out / "train.csv", "figure": out / "train.png"})


def benchmark(
    what: Annotated[
        Annotated[
            None, tyro.conf.subcommand("tensor-products", constructor=benchmark_tensor_products)
        ]
        | Annotated[None, tyro.conf.subcommand("train", constructor=benchmark_train)],
        tyro.conf.OmitSubcommandPrefixes,
    ],
) -> None:
    """Measure speed on this machine: of tensor products, or of training."""


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


def _boards(wandb: str | None) -> tuple[Any, ...]:
    from equizoo.train.progress import BOARDS, WeightsAndBiases

    return BOARDS if wandb is None else (*BOARDS, WeightsAndBiases(wandb))


def _join_hosts(place: str | None) -> None:
    from equizoo.train.hosts import join

    if place is not None:
        join(place)


@contextlib.contextmanager
def _telling(every: float = 30.0) -> Iterator[Callable[[str], None]]:
    """Says what is being done: on a terminal in one line that changes, else every so many seconds.

    A log file thus shows how far a long command is.
    """
    console, last = Console(stderr=True), time.monotonic()

    def line(what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            console.print(_escape(what), highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    with console.status("") as status:
        yield lambda what: status.update(_escape(what))


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


def _limit(text: str) -> tuple[str, float]:
    """``forces_mae_meV_per_A=20`` as a name and a number."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ValueError(
            f"--max-error is {text!r}, expected name=number such as forces_mae_meV_per_A=20."
        ) from None


def _label_keys(energy: str | None, forces: str | None, stress: str | None):
    """Explicit label keys, or ``None`` when none was given."""
    from equizoo.data.readers import LabelKeys

    given = {"energy": energy, "forces": forces, "stress": stress}
    given = {label: key for label, key in given.items() if key is not None}
    return LabelKeys(**given) if given else None


def _reader_is_gone() -> bool:
    """Whether what standard output goes to (such as `head`) has closed it; if so, the rest of it
    goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _use_huge_pages() -> None:
    """Starts the process anew with large arrays on 2 MB pages, where the C library can do that.

    With the usual 4 KB pages, page faults take up to half of a model's time on a CPU. The library
    reads its settings before Python runs; whoever has set them is left alone.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
        if key in ("card", "metrics", "training_data") or value is None:
            continue
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", _escape(_words(value)))
    for row in card.get("training_data", ()):
        trained_on = f"{row['name']} ({row['license']}): {row['citation']}"
        table.add_row("[bold]trained on[/]", _escape(trained_on))
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
    table = Table(title=_escape(title), title_justify="left")
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
            table.add_row(_escape(dataset), *([stage] if any(stages) else []), *cells)
    Console().print(table)


def _print_comparison(comparison: Any) -> None:
    title = _escape(f"{comparison.dataset}, {comparison.dtype}")
    table = Table("", *map(_escape, comparison.models), title=title)
    for label, cells in comparison.rows():
        table.add_row(_escape(label), *(_escape(cell) for cell in cells))
    console = Console()
    console.print(table)
    for note in comparison.notes:
        console.print(_escape(note), highlight=False)


def _print_diagnosis(diagnosis: Any, model: str | None = None) -> None:
    colors = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]"}
    table = Table(Column(no_wrap=True), "check", Column("count", justify="right"), "finding")
    title = diagnosis.name if model is None else f"{diagnosis.name} for {model}"
    table.title, table.title_justify = _escape(title), "left"
    table.show_lines = True
    fine = []
    for finding in diagnosis.findings:
        if finding.verdict == "fine":
            fine.append(finding.check)
            continue
        lines = [finding.message, finding.fix and f"→ {finding.fix}"]
        lines += [f"e.g. {', '.join(finding.examples)}" if finding.examples else ""]
        table.add_row(
            colors.get(finding.verdict, str(finding.verdict)),
            _escape(finding.check),
            str(finding.count or ""),
            _escape("\n".join(filter(None, lines))),
        )
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(f"fine: {_escape(', '.join(fine)) or 'nothing'}", highlight=False)
    errors, warnings = len(diagnosis.errors), len(diagnosis.warnings)
    counted = f"{diagnosis.frames} frames, {errors} errors, {warnings} warnings"
    console.print(counted, highlight=False)


def _print_certificate(certificate: Any) -> None:
    colors = {"passed": "green", "failed": "bold red"}
    table = Table("property", "verdict", "measured (allowed)", show_lines=True)
    for name, verdict, text, _ in certificate.rows():
        color = colors.get(verdict, "yellow")
        table.add_row(name, f"[{color}]{verdict}[/]", _escape(text))
    console = Console()
    console.print(table)
    console.print(_escape(f"{certificate.structures}; {certificate.device}"), highlight=False)
    for name, _, _, how in certificate.rows():
        if how:
            console.print(_escape(f"{name}: {how}"), highlight=False)


def _print_model(out: Path) -> None:
    Console().print(f"model: {out / 'model'}", highlight=False, soft_wrap=True)


def _ignore(row: Any) -> None:
    pass


def _print_row(row: Any) -> None:
    size = f"{row.mode} l_max={row.l_max}, {row.batch} x {row.channels}"
    time = f"{row.median_ms:.3f} ms" if row.median_ms is not None else row.skipped
    text = f"{size}, {row.library} {row.variant}, {row.direction}: {time}"
    Console().print(_escape(text), highlight=False, soft_wrap=True)


def _print_benchmark(result: Mapping[str, Any]) -> None:
    lines = [f"{result['points']} points: {result['file']}"]
    lines += [f"{count} not measured: {reason}" for reason, count in result["skipped"].items()]
    lines += [f"figure: {figure}" for figure in result["figures"]]
    lines += [f"table: {result['table']}"] if "table" in result else []
    Console().print(_escape("\n".join(lines)), highlight=False, soft_wrap=True)


def _print_interrupted(out: Path) -> None:
    from equizoo.train.run_folder import FACTS

    message = f"stopped and saved; continue with --out {out} --resume"
    if not (out / FACTS).exists():
        message = "stopped before the run began, nothing was written; give the same command again"
    Console(stderr=True).print(message, highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
