"""Options of XLA's compiler for a device, as data, each with its reason.

    OPTIONS["TPU v5 lite"]                                           the options for a v5e
    options(jax.devices()[0], ("xla_tpu_scoped_vmem_limit_kib=65536",))       with one more: {name: value}
    jax.jit(step, compiler_options=...)                              no environment variable is needed

A run and its plan compile the training step and the validation loss with them. `Experiment.xla` (`--xla NAME=VALUE
...`) adds options and replaces these; so do the variables XLA_FLAGS and LIBTPU_INIT_ARGS.

An option is here if it makes the compiled programs of shipped experiments better (`gptjax plan`: bytes moved and sent,
memory) or was measured on the device. docs/plan.md has what was tried and had no effect.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Value = bool | int | float | str
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables with options that XLA and libtpu read themselves."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of XLA's compiler."""

    name: str
    value: Value
    reason: str
    """Its effect in a plan or a measurement, or who recommends it."""

    @property
    def text(self) -> str:
        return _text(self.value)


TRITON = Option(
    "xla_gpu_enable_triton_gemm",
    False,
    "cuBLAS computes matrix products, and XLA does not time kernels of its own for each: half the time to compile, and "
    "a step of GPT-2 takes 2 % less on an H100. Products in 8 bits need it",
)
WHOLE_PRODUCTS = Option(
    "xla_jf_spmd_threshold_for_windowed_einsum_mib",
    1_000_000,
    "products with gathered weights are not split into loops over the slices of a ring, which overlap with their "
    "communication but read operands and write results again: gpt_1b5 sharded over all 16 chips (--mesh.data 1 "
    "--mesh.fsdp 16 --pretrain.accumulate 8 --model.remat nothing_saveable) moves 1,121 GiB a step to and from HBM "
    "instead of 2,298, sends 86 instead of 74, and the expected MFU is 58 instead of 47 %. MaxText has it as "
    "DISABLE_COLLECTIVE_MATMUL",
)
SCATTER = Option(
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
    1,
    "gradients that are sharded over their last axis are reduce-scattered, not all-reduced: moe_30b_a3b on v5p:4x4x8 "
    "sends 167 GiB a step instead of 185, of which 9.5 instead of 45 in all-reduces. Nothing changes for llama3_8b. "
    "Part of MaxText's LAYOUT_FOR_ALL_REDUCE_SCATTER",
)
OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "gpu": (TRITON,),
    "TPU v5 lite": (WHOLE_PRODUCTS,),
    "TPU v5": (SCATTER,),
}
"""Platform, or `jax.Device.device_kind` -> options."""


def options(device: Any, changes: Sequence[str] = ()) -> dict[str, Value]:
    """Options for programs of a device, which may be a description of one: those of `OPTIONS` but for the ones to which
    an environment variable gives another value, and the changes, `NAME=VALUE` each. An option of the table that this
    XLA does not know is left out. Raises UserError for a change that it does not know, or with a bad value."""
    from gptjax.types import UserError  # it imports jax, which must not be imported before `processes.configure`

    given = dict(map(_parse, changes))
    table = (option for key in (device.platform, device.device_kind) for option in OPTIONS.get(key, ()))
    found = {option.name: option.value for option in table if _in_environment(option) in (None, option.text)} | given
    while (refusal := _refusal(device, found)) is not None:
        name = next((name for name in found if re.search(rf"\b{name}\b", refusal)), "")
        if name in given:
            raise UserError(
                f"xla: got {name}={_text(given[name])}, which XLA refuses for a {device.device_kind}: {refusal}"
            )
        if "No such compile option" not in refusal:
            raise RuntimeError(refusal)
        del found[name]
    return found


def described(options: Mapping[str, Value]) -> list[str]:
    """`NAME=VALUE` of each option, as `Experiment.xla` takes them."""
    return [f"{name}={_text(value)}" for name, value in options.items()]


def flags(options: Iterable[Option]) -> list[str]:
    """Those of the options that no environment variable sets, as XLA_FLAGS has them."""
    return [f"--{option.name}={option.text}" for option in options if _in_environment(option) is None]


def _parse(change: str) -> tuple[str, Value]:
    from gptjax.types import UserError

    name, equals, text = change.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"\w+", name):
        raise UserError(f"xla: got {change}, must be NAME=VALUE, such as xla_tpu_scoped_vmem_limit_kib=65536")
    if text.lower() in ("true", "false"):
        return name, text.lower() == "true"
    for number in (int, float):
        try:
            return name, number(text)
        except ValueError:
            pass
    return name, text


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_environment(option: Option) -> str | None:
    """Value of an option in the environment variables, the last one. None: it is in none."""
    words = " ".join(os.environ.get(variable, "") for variable in VARIABLES).split()
    values = [word.partition("=")[2] for word in words if word.lstrip("-").partition("=")[0] == option.name]
    return values[-1] if values else None


def _refusal(device: Any, options: Mapping[str, Value]) -> str | None:
    """The compiler's message if it refuses an option. None: it takes all of them."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from gptjax.types import one_line

    nothing: Any = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        if options:
            jax.jit(lambda x: x, compiler_options=dict(options)).lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        return one_line(error).removeprefix("INVALID_ARGUMENT: ").rstrip(" :")
    return None
