"""Parameters chosen by patterns of their dotted paths, as in ``layers.0.linear.*``."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax


def match_paths(params: Any, patterns: Sequence[str], *, must_match: bool = True) -> Any:
    """A tree of booleans like ``params``: whether the dotted path matches one of the patterns."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in patterns:
        if must_match and not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter. Parameters: {', '.join(paths)}."
            )
    matched = [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), matched)


def path_name(path: Sequence[Any]) -> str:
    """``layers.0.linear.kernels.1o`` from the keys of a tree path."""
    names = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return ".".join(name for name in names if name != "value")
