"""The shipped experiments, importable as `gptjax.experiments.NAME`.

A wheel carries their files here. A checkout has them in `experiments/` at its top, which this package then searches.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "experiments"
if (_checkout / "quickstart.py").is_file():
    __path__.append(str(_checkout))
