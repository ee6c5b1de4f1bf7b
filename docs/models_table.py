"""Rewrites the table of released models in the README from the model cards: `make readme`."""

import re
from collections.abc import Mapping
from pathlib import Path

from marked_pages import page_with, table

from equizoo.registry import MODELS, ModelEntry, shown_elements

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- models:begin -->\n", "<!-- models:end -->"


def models_table(models: Mapping[str, ModelEntry]) -> str:
    """Markdown: a table of models, with weights of ours first, and a table of their errors."""
    if not models:
        return "No model is released yet.\n"
    ours_first = sorted(models.values(), key=lambda m: m.checkpoint is not None)
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
            for m in ours_first
        ),
    )
    errors = table(
        ("model", "data set", "split", "energy RMSE", "MAE", "forces RMSE", "MAE"),
        (
            (
                f"`{m.name}`",
                str(row["dataset"]),
                str(row["split"]),
                _error(row, "energy_rmse"),
                _error(row, "energy_mae", "meV_per_atom"),
                _error(row, "forces_rmse"),
                _error(row, "forces_mae"),
            )
            for m in models.values()
            for row in m.metrics
        ),
    )
    return f"{released}\nErrors, as the cards state them:\n\n{errors}"


def readme_with(readme: str, models: str) -> str:
    """The README with ``models`` between its two marker lines."""
    return page_with(readme, models, BEGIN, END)


def _error(row: Mapping[str, str | float], label: str, unit: str = r"\w+") -> str:
    """``forces_rmse_meV_per_A: 8.8`` as "8.8 meV/Å"; a dash where the card has no such number."""
    for key, value in row.items():
        if match := re.fullmatch(rf"{label}_({unit})", key):
            shown = re.sub(r"\bA\b", "Å", match[1].replace("_per_", "/"))
            return f"{value:.3g} {shown}"
    return "–"


if __name__ == "__main__":
    README.write_text(readme_with(README.read_text("utf-8"), models_table(MODELS)), "utf-8")
