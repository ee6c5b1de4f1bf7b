"""Rewrites the table of released models in the README from the model cards: `make readme`."""

import re
from collections.abc import Mapping
from pathlib import Path

from marked_pages import page_with, table

from equizoo.registry import MODELS, ModelEntry, shown_elements

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- models:begin -->\n", "<!-- models:end -->"


def models_table(models: Mapping[str, ModelEntry]) -> str:
    """Markdown: a table of models and a table of their root mean square errors."""
    if not models:
        return "No model is released yet.\n"
    released = table(
        ("model", "elements", "cutoff", "level of theory", "parameters", "licence of the weights"),
        (
            (
                f"[`{m.name}`](model_cards/{m.name}.md)",
                shown_elements(m.elements),
                f"{m.cutoff:g} Å",
                f"{m.level_of_theory} ({m.energy_reference} energy)",
                "" if m.parameters is None else f"{m.parameters:,}",
                m.license_weights,
            )
            for m in models.values()
        ),
    )
    errors = table(
        ("model", "data set", "split", "energy", "forces"),
        (
            (
                f"`{m.name}`",
                str(row["dataset"]),
                str(row["split"]),
                _error(row, "energy"),
                _error(row, "forces"),
            )
            for m in models.values()
            for row in m.metrics
        ),
    )
    return f"{released}\nRoot mean square errors, as the cards state them:\n\n{errors}"


def readme_with(readme: str, models: str) -> str:
    """The README with ``models`` between its two marker lines."""
    return page_with(readme, models, BEGIN, END)


def _error(row: Mapping[str, str | float], label: str) -> str:
    """``forces_rmse_meV_per_A: 8.8`` as "8.8 meV/Å"; a dash where the card has no such number."""
    for key, value in row.items():
        if match := re.fullmatch(rf"{label}_rmse_(\w+)", key):
            unit = re.sub(r"\bA\b", "Å", match[1].replace("_per_", "/"))
            return f"{value:.3g} {unit}"
    return "–"


if __name__ == "__main__":
    README.write_text(readme_with(README.read_text("utf-8"), models_table(MODELS)), "utf-8")
