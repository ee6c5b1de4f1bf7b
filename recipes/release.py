"""Puts a finished run into the package: weights, golden outputs, card, log and plots.

``python recipes/release.py RUN_FOLDER PROVENANCE.json``: the provenance file holds what cannot be
measured from the weights (see ``equizoo.eval.card.Provenance``). Writes
``equizoo/bundled/<name>/``, ``model_cards/<name>.md`` and ``model_cards/<name>/`` (errors, images,
log). Afterwards ``equizoo certify NAME --card`` adds the certificate, and
``examples/make_replay.py`` makes the data set ``<name>/replay`` anew, where there is one.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import tyro

from equizoo.data.datasets import load_dataset
from equizoo.eval.card import Provenance, make_card, write_evaluations
from equizoo.eval.evaluate import evaluate
from equizoo.eval.plots import parity_plot
from equizoo.eval.potential import load

ROOT = Path(__file__).resolve().parents[1]


def release(run: tyro.conf.Positional[Path], provenance: tyro.conf.Positional[Path]) -> None:
    """Release the model of a run.

    Args:
        run: folder that ``equizoo train`` wrote.
        provenance: JSON file with licence, data and limits.
    """
    facts = json.loads(provenance.read_text())
    report = json.loads((run / "report.json").read_text())
    name = report["name"]
    evaluated_on = facts.pop("evaluated_on")
    potential = load(run / "model")
    potential.name = name
    evaluations = [evaluate(potential, load_dataset(data), progress=True) for data in evaluated_on]

    folder = ROOT / "equizoo" / "bundled" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "model", folder)
    images = ROOT / "model_cards" / name
    shutil.rmtree(images, ignore_errors=True)  # all of it is of other weights
    images.mkdir()
    write_evaluations(images, evaluations)
    parity_plot(evaluations, images / "parity.png")
    shutil.copy(run / "learning_curve.png", images / "learning_curve.png")
    shutil.copy(run / "metrics.jsonl", images / "metrics.jsonl")
    card = make_card(
        potential,
        evaluations,
        Provenance(training_hours=report["hours"], **facts),
        (folder / "model.safetensors").read_bytes(),
        {
            "Predicted against reference": f"{name}/parity.png",
            "Errors during training": f"{name}/learning_curve.png",
        },
    )
    (ROOT / "model_cards" / f"{name}.md").write_text(card)
    print(json.dumps([dataclasses.asdict(e)["metrics"] for e in evaluations], indent=2))


if __name__ == "__main__":
    tyro.cli(release)
