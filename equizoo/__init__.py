"""Equivariant interatomic potentials in JAX.

``equizoo.load(name)`` gives a potential, ``equizoo.list_models()`` says which there are. Nothing
heavy is imported until one of these is asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "Potential": "equizoo.eval.potential",
    "describe": "equizoo.eval.potential",
    "list_models": "equizoo.registry",
    "load": "equizoo.eval.potential",
}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'equizoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF))
