"""Numerics of the test run: float64 on, no silent promotion of dtype or rank."""

import os
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax
import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header():
    return (
        f"jax {jax.__version__}, flax {flax.__version__}, XLA_FLAGS={os.environ.get('XLA_FLAGS')}"
    )


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="about one of N tests, chosen by name",
    )


def pytest_collection_modifyitems(config, items):
    every = config.getoption("every")
    if every > 1:
        left_out = {item for item in items if zlib.crc32(item.nodeid.encode()) % every}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    if config.pluginmanager.hasplugin("xdist"):
        _share_out(items)


def _share_out(items):
    """What goes to one process together: a file, since what one of its tests compiles the next ones
    use; of the files of laws, what is for one product or model."""
    for item in items:
        group = item.path.stem
        if group.endswith("_laws"):
            group += f" of {item.callspec.params['name']}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Programs of one file are of no use to the next, and together fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face Hub on the loopback, an empty cache, and a token that may write."""
    from hub_server import TOKEN, running
    from huggingface_hub import constants

    with running() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
