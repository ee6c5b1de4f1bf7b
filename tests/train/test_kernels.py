"""A run with machine code of our own for sums over neighbours is the same run, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import frames_of, make_structures, packing_for, tiny_model
from flax import nnx

import equizoo.train.loop as loop
import equizoo.zoo._base as base
from equizoo.registry import ARCHITECTURES
from equizoo.tensor_products.native import Native
from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.optimizer import make_optimizer
from equizoo.train.step import init_state, make_train_step
from equizoo.zoo._base import Kernels


def test_the_same_step():
    frames = frames_of(make_structures(12))
    model = tiny_model()
    batch = jax.tree.map(jnp.asarray, packing_for(frames, 3)(frames[:3]))
    optimizer = make_optimizer(Optimizer(), nnx.state(model, nnx.Param), 10)
    reports, params, texts = [], [], []
    for kernels in Kernels:
        computing = model.with_kernels(kernels)
        step = make_train_step(computing, optimizer, LossWeights(), 0.99)
        arguments = (init_state(model, optimizer), *batch, jnp.asarray(1.0, jnp.float32))
        texts.append(step.lower(*arguments).as_text())
        state, report = step(*arguments)
        reports.append(report)
        params.append(jax.tree.leaves(state.params))
    assert ["custom_call @equizoo_" in text for text in texts] == [False, True]
    np.testing.assert_allclose(reports[0].loss, reports[1].loss, rtol=1e-5)
    np.testing.assert_allclose(reports[0].gradient_norm, reports[1].gradient_norm, rtol=1e-4)
    for a, b in zip(*params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_run_takes_it_and_its_model_does_not(tmp_path, monkeypatch):
    frames, used = frames_of(make_structures(6)), []
    made = Native.made_for.__func__
    monkeypatch.setattr(
        Native, "made_for", classmethod(lambda cls, p: used.append(p) or made(cls, p))
    )
    config = TrainConfig(epochs=1, batch_size=3, kernels=Kernels.NATIVE)
    model = tiny_model()
    fitted = loop.fit(model, frames[:4], frames[4:], packing_for(frames), config, tmp_path)
    assert used == [model.config.tensor_product]
    assert fitted.finished and not isinstance(model.config.tensor_product, Native)


def test_architectures_without_it_say_so(tmp_path):
    others = [name for name in ARCHITECTURES if Kernels.NATIVE not in _class(name).kernels]
    assert "mace" not in others and others
    for name in others:
        cls = _class(name)
        with pytest.raises(ValueError, match=f"kernels is 'native', which {cls.__name__} does not"):
            base.Architecture.with_kernels(object.__new__(cls), Kernels.NATIVE)


def _class(name):
    module = __import__(ARCHITECTURES[name].__module__, fromlist=["x"])
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base.Architecture)
        and value.__module__ == module.__name__
    ]
    return found
