"""The commands `equizoo leaderboard ...`, from a model and data to a checked and scored file."""

import json

import numpy as np
import pytest
from models import mace_potential
from test_leaderboard import save_split

from equizoo import cli

COUNTS = {"id": 3, "ood": 2}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    for seed, (split, count) in enumerate(COUNTS.items()):
        save_split(folder / "data" / f"val_{split}", count, seed)
    (folder / "counts.json").write_text(json.dumps(COUNTS))
    return folder


def run(here, capsys, *arguments):
    common = ("--part", "val", "--counts", here / "counts.json", "--json", "-")
    cli.main(["leaderboard", *(str(argument) for argument in (*arguments, *common))])
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["leaderboard", *(str(argument) for argument in arguments)])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_from_a_model_to_a_scored_file(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out, data = here / "a.npz", here / "data"
    predict = ("oc22-s2ef", "mace-3bpa", data, "--out", out, "--part-size", 2)
    first = run(here, capsys, *predict, "--share", 0, 2)
    assert first == {"parts": str(here / "a.npz.parts"), "missing_parts": 1}
    assert not out.exists()
    result = run(here, capsys, *predict, "--share", 1, 2)
    assert result["systems"] == COUNTS and result["dtypes"] == ["float32"]
    assert run(here, capsys, "check", out, "--task", "oc22-s2ef") == result
    scores = run(here, capsys, "score", "oc22-s2ef", out, data)["splits"]
    assert scores.keys() == COUNTS.keys()
    assert scores["id"]["num_systems"] == 3 and scores["id"]["forces_mae_meV_per_A"] > 0
    with np.load(out) as arrays:  # as EvalAI has it: ids sorted as text, forces of free atoms
        assert arrays["id_ids"].tolist() == ["10_3", "11_3", "9_3"]
        free = arrays["id_forces"].shape
    other = here / "space.npz"
    as_space = ("--out", other, "--part-size", 2, "--layout", "space")
    run(here, capsys, "oc22-s2ef", "mace-3bpa", data, *as_space)
    with np.load(other) as arrays:
        assert arrays["id_ids"].tolist() == ["9_3", "10_3", "11_3"]
        assert arrays["id_forces"].shape == (free[0] + 3, 3)  # the first atom of each is fixed
    counts = ("--counts", here / "counts.json")
    cli.main(["leaderboard", "score", "oc22-s2ef", str(out), str(data), *map(str, counts)])
    text = capsys.readouterr().out
    assert "EquiformerV2 lE4 lF100" in text and "computed here" in text
    assert "not comparable" in text and "https://arxiv.org/abs/2306.12059" in text
    assert "exists; choose another name" in fails(capsys, *predict)


def test_relaxed_energies_and_structures(here, capsys):
    data, counts = here / "initial", ("--counts", here / "counts.json")
    for seed, (split, count) in enumerate(COUNTS.items()):
        save_split(data / split, count, seed, s2ef=False)
    mace_potential().save(here / "tiny")
    few = ("--max-steps", 2, "--optimizer", "fire", "--batch-nodes", 32)
    scores, paths = {}, {}
    for key, task, options in (
        ("direct", "oc22-is2re", ("--by", "direct")),
        ("relaxed", "oc22-is2re", few),
        ("positions", "oc22-is2rs", few),
    ):
        paths[key] = here / f"{key}.npz"
        result = run(here, capsys, task, here / "tiny", data, "--out", paths[key], *options)
        assert result["task"] == task and result["systems"] == COUNTS
        scores[key] = run(here, capsys, "score", task, paths[key], data)["splits"]["id"]
    assert scores["direct"]["energy_mae_meV"] != scores["relaxed"]["energy_mae_meV"]
    assert scores["positions"].keys() > {"num_systems", "ADwT_percent"}
    with np.load(paths["direct"]) as direct, np.load(paths["relaxed"]) as relaxed:
        change = relaxed["id_energy"] - direct["id_energy"]  # of two steps downhill
        assert (change <= 0).all() and (change < 0).any()
    assert (
        "unrecognized"
        in fails(
            capsys, "oc22-is2rs", here / "tiny", data, "--out", here / "e.npz", "--by", "direct"
        ).lower()
    )
    cli.main(["leaderboard", "score", "oc22-is2re", str(paths["relaxed"]), str(data),
              *map(str, counts)])  # fmt: skip
    assert "not comparable" in capsys.readouterr().out


def test_what_cannot_be_done(here, capsys):
    model = ("mace-3bpa", here / "data", "--out", here / "b.npz")
    text = fails(capsys, "oc22-s2ef", *model, "--part", "val")
    assert "has 3 systems, expected 394727 for oc22-s2ef val id" in text
    assert "must end in .npz" in fails(
        capsys, "oc22-s2ef", "mace-3bpa", here / "data", "--out", here / "b"
    )
    np.savez(here / "c.npz", id_ids=np.array(["1"]), ood_ids=np.array(["1"]))
    text = fails(capsys, "check", here / "c.npz", "--task", "oc22-is2re")
    assert "id_energy missing" in text
    assert "give --task" in fails(capsys, "check", here / "c.npz", "--part", "val")


def test_a_model_of_total_energies_is_not_for_oc20(here, capsys):
    for seed, split in enumerate(("id", "ood_ads", "ood_cat", "ood_both")):
        save_split(here / "oc20" / split, 1, seed)
    (here / "ones.json").write_text(
        json.dumps(dict.fromkeys(("id", "ood_ads", "ood_cat", "ood_both"), 1))
    )
    text = fails(
        capsys, "oc20-s2ef", "mace-3bpa", here / "oc20", "--out", here / "d.npz",
        "--counts", here / "ones.json",
    )  # fmt: skip
    assert "oc20-s2ef takes adsorption energies" in text
