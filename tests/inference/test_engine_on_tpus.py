"""The engine's programs, compiled for TPUs that are elsewhere."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_the_engine_reads_pages_by_a_kernel_on_tpus():
    """In every layer, without a copy of a layer's pages. A prefill needs the last layer's keys and values alone."""
    program = Path(__file__).with_name("compile_engine_for_tpu.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    without = found.pop("without")
    assert {name: calls for name, (calls, _) in found.items()} == {
        "v5e decode": 2,
        "v5e prefill": 1,
        "v6e decode": 2,
        "four chips": 1,
    }
    assert all(copied < 0.5 for _, copied in found.values())
    assert without[0] == 0
    assert without[1] > 1
