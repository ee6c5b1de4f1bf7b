"""Models to the Hub: what a repository holds, and a card in the words that the Hub reads."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equizoo import hub
from equizoo.eval.potential import Potential, load
from equizoo.hub_client import Upload, upload_files
from equizoo.registry import MODELS, find_model_folder

# Front matter that the Hub knows, https://huggingface.co/docs/hub/model-cards; there `metrics` are
# names only, so ours go to `model-index`, and all that is left under a key of our own.
_HUB_FIELDS = (
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model"),
    "tags",
)
_OWN = "equizoo"
_SIDE_FILES = (".png", ".json", ".jsonl")


def push(potential: Potential, repo: str, *, message: str, **options: Any) -> Upload:
    """Where the model is on the Hub afterwards; see :meth:`Potential.push_to_hub`."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        potential.save(folder)
        files: dict[str, Path | bytes] = {name: folder / name for name in hub.REQUIRED}
        files[hub.CARD] = hub_card(potential).encode()
        return upload_files(repo, files, message=message, **options)


def publish(spec: str, repo: str, *, message: str | None = None, **options: Any) -> Upload:
    """Where a released model, or a model folder, is on the Hub afterwards: the folder's very files,
    card, images, logs and certificate.

    ``options`` are those of :func:`equizoo.hub_client.upload_files`. The model is loaded and must
    give its golden outputs first. Raises ``ValueError`` when it does not, for checkpoints of other
    people (publish them from a folder, if their licence allows it), and as ``upload_files`` does.
    """
    files = repository_files(spec)
    return upload_files(repo, files, message=message or f"Publish {spec}", **options)


def repository_files(spec: str) -> dict[str, Path | bytes]:
    """What :func:`publish` uploads, by path in the repository."""
    if spec in MODELS and MODELS[spec].checkpoint is not None:
        raise ValueError(
            f"{spec} is other people's checkpoint ({MODELS[spec].license_weights}), fetched from "
            "their address and not redistributed. If its licence allows it, convert it to a "
            "folder and publish that."
        )
    potential = load(spec)
    folder = find_model_folder(spec)
    files: dict[str, Path | bytes] = {name: folder / name for name in hub.REQUIRED}
    if spec in MODELS:
        potential.card = MODELS.text(spec)
        beside = MODELS.folder / spec
        files |= {
            f"{spec}/{file.name}": file
            for file in sorted(beside.glob("*"))
            if file.suffix in _SIDE_FILES
        }
    files[hub.CARD] = hub_card(potential).encode()
    return files


def hub_card(potential: Potential) -> str:
    """The model's card with front matter that the Hub understands.

    ``model-index`` holds the errors, ``equizoo`` what only we read; a model without a card gets
    one that says what it is. Where the model is on the Hub is left out: it would change with
    every upload.
    """
    if potential.card is None:
        return hub.join_front_matter(_front_matter({}), _plain_body(potential))
    if not potential.card.startswith("---\n"):
        return hub.join_front_matter(_front_matter({}), potential.card)
    fields, body = hub.split_front_matter(potential.card, f"the card of {potential.name}")
    if _OWN in fields:  # as it came from the Hub
        return potential.card
    return hub.join_front_matter(_front_matter(fields), body)


def _front_matter(fields: Mapping[str, Any]) -> dict[str, Any]:
    front = {key: fields[key] for key in _HUB_FIELDS if fields.get(key) is not None}
    front |= {"library_name": "equizoo", "pipeline_tag": "graph-ml"} | front
    front.setdefault("tags", ["interatomic-potential", "equivariant", "jax"])
    if datasets := [name for name in fields.get("datasets", ()) if "/" in name]:
        front["datasets"] = datasets  # others are no data sets of the Hub
    if rows := fields.get("metrics"):
        results = [_result(row) for row in rows]
        front["model-index"] = [{"name": fields["name"], "results": results}]
    shown = {*_HUB_FIELDS, "metrics", "hub_repo", "hub_revision"}
    if own := {key: value for key, value in fields.items() if key not in shown}:
        front[_OWN] = own
    return front


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
    return {
        "task": {"type": "graph-ml", "name": "interatomic potential"},
        "dataset": {"type": row["dataset"], "name": row["dataset"], "split": row["split"]},
        "metrics": [
            {"type": key, "value": value, "name": key.replace("_", " ")}
            for key, value in numbers.items()
        ],
    }


def _plain_body(potential: Potential) -> str:
    lines = [f"# {potential.name}", "", "An interatomic potential made with equizoo.", ""]
    for key, value in potential.describe().items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"- {key.replace('_', ' ')}: {shown}")
    return "\n".join([*lines, ""])


def require_pinnable(name: str, in_pull_request: bool) -> None:
    """Raises ``ValueError`` for anything that is not a released model, and for a pull request,
    whose commit is not yet the repository's."""
    if name not in MODELS or in_pull_request:
        raise ValueError(
            f"{name} cannot be pinned; expected a released model, published to a branch rather "
            "than in a pull request."
        )


def pin(name: str, upload: Upload) -> Path:
    """The card of a released model, which from now on says where on the Hub its weights are.

    Raises ``ValueError`` as :func:`require_pinnable` does.
    """
    require_pinnable(name, upload.pull_request is not None)
    path = MODELS.folder / f"{name}.md"
    fields, body = hub.split_front_matter(MODELS.text(name), str(path))
    fields |= {"hub_repo": upload.repo, "hub_revision": upload.commit}
    path.write_text(hub.join_front_matter(fields, body), "utf-8")
    return path
