"""Models with quantised weights: rounding and calibration."""

from gptjax.inference.quantise.gptq import gptq_params as gptq_params
from gptjax.inference.quantise.weights import errors as errors
from gptjax.inference.quantise.weights import from_arrays as from_arrays
from gptjax.inference.quantise.weights import is_quantised as is_quantised
from gptjax.inference.quantise.weights import quantise_params as quantise_params
from gptjax.inference.quantise.weights import to_arrays as to_arrays
