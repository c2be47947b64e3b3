"""Parameters for laws that hold for any values, and one compiled program for each model and shape of its inputs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from gptjax.distributed.parameters import ParamInfo, parameter_info
from gptjax.types import Params


def drawn(model: Any, *inputs: Any, deviation: float = 0.06, seed: int = 0, **named: Any) -> Params:
    """Parameters of a Flax module, drawn by numpy: its own initialisation takes five times longer to compile than its
    output. Scales, biases and other vectors are positive and not alike, so that each counts.

    inputs     arguments of `init` after the key. None: those of a model over tokens
    deviation  standard deviation of matrices and tables; 0.06 makes attention that is not uniform
    """
    random = np.random.default_rng(seed)

    def draw(info: ParamInfo) -> np.ndarray:
        normal = random.normal(size=info.shape).astype(np.float32)
        is_vector = info.kind == "other" and len(info.shape) - info.batch < 2
        return np.float32(0.5) + np.abs(normal) / 4 if is_vector else np.float32(deviation) * normal

    infos = parameter_info(model, *inputs, **named)
    return jax.tree.map(draw, infos, is_leaf=lambda x: isinstance(x, ParamInfo))


def placed(model: Any, params: Params, *inputs: Any) -> Params:
    """Parameters on the current mesh, sharded as the model would initialise them for these inputs."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda p, s: jax.device_put(p, jax.NamedSharding(mesh, s.sharding.spec)), params, shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="documents")
def apply(model: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Output of a model; models that are equal share one program for inputs of the same shapes."""
    return model.apply({"params": params}, *args, **kwargs)
