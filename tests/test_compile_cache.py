"""Loading a compiled program runs it: the folder of programs must be the user's own."""

import os
import stat

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from equizoo.compile_cache import make_private, uncached, use_compile_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty ``EQUIZOO_CACHE``; JAX has no folder of its own meanwhile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setenv("EQUIZOO_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def mode(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_programs_are_kept_in_a_private_folder(cache):
    jax.jit(lambda x: x + 1)(jnp.ones(3))  # a program compiled before must not keep it from working
    assert use_compile_cache() == cache / "jax"
    assert mode(cache / "jax") == 0o700
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(5)).block_until_ready()
    assert any((cache / "jax").iterdir())


def test_nothing_is_read_from_the_cache_or_written(cache):
    use_compile_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = jax.config.jax_enable_compilation_cache
    with uncached():
        assert not jax.config.jax_enable_compilation_cache
        jax.jit(lambda x: jnp.cos(x) * 7.5)(jnp.ones(5)).block_until_ready()
    assert not any((cache / "jax").iterdir())
    assert jax.config.jax_enable_compilation_cache == before


def test_a_folder_that_jax_has_is_left_alone(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use_compile_cache() == tmp_path / "mine"
    assert not cache.exists()


def test_an_open_folder_is_closed(cache):
    (cache / "jax").mkdir(parents=True, mode=0o755)
    (cache / "jax").chmod(0o777)
    assert use_compile_cache() == cache / "jax"
    assert mode(cache / "jax") == 0o700


def test_calculators_use_it(cache):
    from equizoo import load

    load("mace-3bpa", check_golden=False).calculator()
    assert jax.config.jax_compilation_cache_dir == str(cache / "jax")


def refused(match):
    with pytest.warns(UserWarning, match=match):
        assert use_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_of_somebody_else_is_not_used(cache, monkeypatch):
    (cache / "jax").mkdir(parents=True)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(f"belongs to user {owner}, expected {owner + 1}")


def test_a_link_is_not_used(cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.mkdir()
    (cache / "jax").symlink_to(tmp_path / "elsewhere")
    refused("is a link")


def test_a_folder_that_others_can_exchange_is_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    refused("writable by everybody")
    cache.chmod(0o1777)  # as /tmp is: only owners rename
    make_private(cache / "jax")


def test_what_cannot_be_made_is_a_warning(cache):
    cache.write_text("a file")
    refused("not kept")
