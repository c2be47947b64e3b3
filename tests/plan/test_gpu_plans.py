"""Plans for GPUs: parts of their programs' text, and a step compiled for H100s where CUDA's wheels are installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import plan as command
from gptjax.distributed.sharding import MeshConfig
from gptjax.plan import changes, compiled, hlo
from gptjax.plan.buffers import Buffers, named
from gptjax.plan.chips import CHIPS
from gptjax.plan.collectives import collectives
from gptjax.plan.compiled import Memory, Step
from gptjax.plan.estimate import estimate, expected
from gptjax.plan.kernels import Kernel, attention, kernels
from gptjax.plan.topology import Target
from gptjax.types import UserError

WHEELS = importlib.util.find_spec("jax_cuda13_plugin") is not None
BOXES = [0, 0, 0, 0, 1, 1, 1, 1]
GROUPS = {  # text -> boxes in a group, GPUs of a group in a box
    "{{0,4},{1,5},{2,6},{3,7}}": (2, 1),
    "[4,2]<=[2,4]T(1,0)": (2, 1),
    "mesh['data'=2,'fsdp'=4] {'data'}": (2, 1),
    "mesh['data'=4,'fsdp'=2], device_ids=([2,4]T(1,0)) {'fsdp'}": (2, 1),
    "{{0,1,2,3},{4,5,6,7}}": (1, 4),
    "[2,4]<=[8]": (1, 4),
    "mesh['data'=2,'fsdp'=4] {'fsdp'}": (1, 4),
    "[1,8]<=[8]": (2, 4),
    "mesh['data'=2,'fsdp'=4] {'data','fsdp'}": (2, 4),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_over_boxes_send_over_the_network_by_every_gpu(groups):
    boxes, gpus = GROUPS[groups]
    text = f"""\
ENTRY %main (x: f32[1024]) -> f32[1024] {{
  %x = f32[1024]{{0}} parameter(0)
  ROOT %y = f32[1024]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true
}}
"""
    found = collectives(hlo.Program.parse(text), BOXES)
    ring = 2 * 4096 * (boxes * gpus - 1) / (boxes * gpus)
    network = ring / gpus if boxes > 1 else 0
    assert sum(c.sent for c in found if c.between_slices) == network
    assert sum(c.sent for c in found) == pytest.approx(ring)
    target = Target.parse("h100:4*2")
    times = estimate(Step({}, 0, Memory(0, 0, 0, 0, 0, 0), collectives=found), target, 8)
    assert times.network == network / 50e9
    assert times.interconnect == pytest.approx((ring - network) / 450e9)


ATTENTION = """\
%body (p: (s32[], bf16[8,1024,12,64])) -> (s32[], bf16[8,1024,12,64]) {
  %p = (s32[], /*index=1*/bf16[8,1024,12,64]{3,2,1,0}) parameter(0)
  %call = (bf16[8,12,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%p#1, %p#1, %p#1), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":\
{"dimensions":["8","12","1024","1024"],"element_type":"BF16"},"is_flash_attention":true,"mask_type":"CAUSAL"}}
  %read = bf16[8,1024,12,64]{3,2,1,0} bitcast(%call#0)
  ROOT %out = (s32[], bf16[8,1024,12,64]{3,2,1,0}) tuple(%p#0, %read)
}

ENTRY %main (x: bf16[256,512], w: bf16[512,128], q: (s32[], bf16[8,1024,12,64])) -> bf16[256,128] {
  %x = bf16[256,512]{1,0} parameter(0)
  %w = bf16[512,128]{1,0} parameter(1)
  %q = (s32[], bf16[8,1024,12,64]{3,2,1,0}) parameter(2)
  %layers = (s32[], bf16[8,1024,12,64]{3,2,1,0}) while(%q), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %product = (bf16[256,128]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %y = bf16[256,128]{1,0} get-tuple-element(%product), index=0
}

"""
"""As GPUs' programs have it when they are dumped: `%p#1` is element 1 of the tuple %p."""


def test_calls_of_cudnn_and_cublas_count_their_products_and_bytes():
    program = hlo.Program.parse(ATTENTION)
    heads, product = kernels(program)
    scores = 8 * 12 * 1024 * 1024
    assert heads.flops == 12 * (2 * 2 * scores * 64) / 2  # two products in each of 12 layers, half of them masked
    assert heads.moved == 12 * 4 * (8 * 1024 * 12 * 64 * 2)  # reads three, writes one
    assert product.flops == 2 * 256 * 512 * 128
    assert attention(program) == {"cuDNN": 12}
    name = 'metadata={op_name="jit(step)/Block/shard_map/attention_forward/pallas_call"}'
    kernel = f'%pallas_call.1 = f32[8]{{0}} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", {name}'
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT {kernel}\n}}\n"
    assert attention(hlo.Program.parse(text)) == {"Pallas": 1}


IN_PLACE = """\
%fused (x: bf16[256,512], w: bf16[512,128], all: bf16[7,256,128], i: s32[]) -> (bf16[7,256,128], s8[1024]) {
  %x = bf16[256,512]{1,0} parameter(0)
  %w = bf16[512,128]{1,0} parameter(1)
  %all = bf16[7,256,128]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %call = (bf16[256,128]{1,0}, s8[1024]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %one = bf16[1,256,128]{2,1,0} bitcast(%call#0)
  %zero = s32[] constant(0)
  %into = bf16[7,256,128]{2,1,0} dynamic-update-slice(%all, %one, %i, %zero, %zero)
  ROOT %both = (bf16[7,256,128]{2,1,0}, s8[1024]{0}) tuple(%into, %call#1)
}

ENTRY %main (x: bf16[256,512], w: bf16[512,128], all: bf16[7,256,128], i: s32[]) -> (bf16[7,256,128], s8[1024]) {
  %x = bf16[256,512]{1,0} parameter(0)
  %w = bf16[512,128]{1,0} parameter(1)
  %all = bf16[7,256,128]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  ROOT %y = (bf16[7,256,128]{2,1,0}, s8[1024]{0}) fusion(%x, %w, %all, %i), kind=kCustom, calls=%fused
}
"""
"""cuBLAS writes into a chunk of a larger array; its second result is the memory that it works in."""


def test_a_product_written_in_place_counts_its_own_bytes():
    (product,) = kernels(hlo.Program.parse(IN_PLACE))
    assert product.flops == 2 * 256 * 512 * 128
    assert product.moved == 2 * (256 * 512 + 512 * 128 + 256 * 128) + 1024 + 4


def test_kernels_run_one_after_the_other():
    """One bound by products, one by memory: the sum of their times, between the best and the worst case."""
    chip, target = CHIPS["h100"], Target.parse("h100:1")
    two = (Kernel("dot", chip.flops, 0.1 * chip.bandwidth), Kernel("add", 0.0, chip.bandwidth))
    step = Step({}, 0, Memory(0, 0, 0, 0, 0, 0), kernels=two)
    times = estimate(step, target, 1)
    assert (times.best, times.worst) == (pytest.approx(1.1), pytest.approx(2.1))
    assert 2.0 < expected(step, target, 1) < 2.0 / 0.7


def test_a_search_takes_microbatches_where_they_save_recomputation(monkeypatch, capsys):
    """A step whose activations, of 64 sequences and more as less is recomputed, fit one way or the other."""
    base = importlib.import_module("experiments.quickstart").experiment
    stage = base.stages["pretrain"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, batch=64), accumulate=1)
    experiment = dataclasses.replace(base, stages={"pretrain": stage}, mesh=MeshConfig())
    saved = {policy: 2 ** (5 - i) for i, policy in enumerate(changes.REMAT)}

    def compile_step(changed, name, devices):
        count, share = changed.stages[name].accumulate, saved[changed.model.remat]
        work = Kernel("step", 1e15 / share + 1e12 * count, 0.0)
        return Step({}, 0, Memory(0, 0, 0, 0, share * 64 * 2**20 // count, 0), kernels=(work,))

    monkeypatch.setattr(compiled, "compile_step", compile_step)
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(CHIPS["h100"], memory=2**30 / 0.75))
    assert command.search(experiment, "pretrain", Target.parse("h100:1"), lambda function: function([])) == 0
    best, *_ = capsys.readouterr().out.splitlines()
    assert best.endswith("--pretrain.accumulate 2 --model.remat None")


ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 400, page 0, parameter 0, shape |f32[10,10]| at ShapeIndex {}, maybe-live-out:
 value: <1 w @0> (size=400,offset=0): f32[10,10]{1,0}
allocation 1: size 8, output shape is |f32[2]|, maybe-live-out:
allocation 2: size 16, constant:
allocation 3: size 7, thread-local:
allocation 4: size 1000, color 1, preallocated-temp:
allocation 5: size 2000, preallocated-temp:
"""
LIVE = """\
  Live ranges at 3 (peak):
    a{1}: 800 bytes (cumulative: 800 bytes)
    b{}: 800 bytes (cumulative: 1600 bytes)
    w{}: 400 bytes (cumulative: 2000 bytes)
  Stack trace breakdown for peak usage: 2 000 bytes
"""
LIVING = """\
ENTRY %main (w: f32[10,10]) -> f32[2] {
  %w = f32[10,10]{1,0} parameter(0), metadata={op_name="state.params[\\'blocks\\'][\\'mlp\\'][\\'up\\']"}
  %a = (f32[2]{0}, bf16[20,20]{1,0}) fusion(%w), kind=kLoop, calls=%f, metadata={op_name="jit(step)/Block/dot_general"}
  %b = bf16[20,20]{1,0} fusion(%w), kind=kLoop, calls=%f, metadata={op_name="jit(step)/Block/dot_general"}
  ROOT %y = f32[2]{0} get-tuple-element(%a), index=0
}
"""


def test_arrays_alive_at_the_peak_have_names():
    """Arguments those of the state; others the operation's; fast memory does not count."""
    buffers = Buffers.parse(ASSIGNMENT, LIVE)
    assert (buffers.arguments, buffers.outputs, buffers.constants, buffers.temporaries) == (400, 8, 16, 2007)
    found = named(hlo.Program.parse(LIVING), buffers)
    assert found == {"2 x bf16[20,20] of Block/dot_general": 1600, "params.blocks.mlp.up": 400}


def run(program: str) -> subprocess.CompletedProcess:
    """A program of its own, as jax reads its environment once and must not have started before a fork."""
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root)


def test_a_compilation_ends_with_its_result():
    """Whatever its threads still do; its mistakes are the caller's, its death has a message."""
    found = run("""
import os, threading, time
from gptjax.plan.compiler import in_child
from gptjax.types import UserError

def started():
    threading.Thread(target=lambda: time.sleep(1_000)).start()
    return {"pid": os.getpid()}

def refuse():
    raise UserError("mesh: not so")

assert in_child(started)["pid"] != os.getpid()
for function in (refuse, lambda: os._exit(3)):
    try:
        in_child(function)
    except UserError as error:
        print(error)
""")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["mesh: not so", "plan: the compiler failed; its message is above"]


@pytest.mark.skipif(WHEELS, reason="CUDA's wheels are installed")
def test_missing_wheels_are_one_line():
    with pytest.raises(UserError, match=r"h100:8, which needs CUDA's wheels .* pip install 'gptjax\[plan-gpu\]'"):
        Target.parse("h100:8").devices()


@pytest.mark.parametrize("target", ["h100", "h100:0", "h100:2x4", "h100:8*0", "h300:8"])
def test_no_box_of_gpus_is_refused(target):
    with pytest.raises(UserError, match="on: got"):
        Target.parse(target)


@pytest.mark.slow
@pytest.mark.skipif(not WHEELS, reason="needs CUDA's wheels: pip install -e '.[plan-gpu]'")
def test_a_step_compiled_for_gpus():
    """Two layers of gpt2_124m on two boxes: cuDNN or Pallas in each, forward, recomputed and backward; stacked
    parameters are nowhere copied; where Pallas attends nothing has T x T elements, not even a mask; gradients are
    summed between boxes."""
    found = run("""
import dataclasses, json, re
from gptjax.plan.topology import Target
target = Target.parse("h100:2*2")
target.prepare()
from experiments.gpt2_124m import experiment
from gptjax.plan import compiled
model = dataclasses.replace(experiment.model, layers=2, vocab=512)
stage = experiment.stages["pretrain"]
stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, batch=16))
experiment = dataclasses.replace(experiment, model=model, stages={"pretrain": stage})
def planned(devices):
    kept, original = [], compiled.optimise
    compiled.optimise = lambda *arguments: kept.append(original(*arguments)) or kept[-1]
    step = compiled.compile_step(experiment, "pretrain", devices)
    return step, sorted({*re.findall(r"\\w+\\[[\\d,]*1024,1024[\\d,]*\\]", kept[0].text)})
step, scores = target.call(planned)
network = sum(c.sent for c in step.collectives if c.between_slices)
copies = [k.name for k in step.kernels if k.name.startswith("copy") and k.moved > 2 * 4 * model.width**2 * 2 * 2]
total = step.memory.total
useful = model.flops(1024) * 16 * 1024
print(json.dumps([step.attention, network, step.count, copies, scores, total, useful, step.flops * 4]))
""")
    assert found.returncode == 0, found.stderr
    calls, network, count, copies, scores, total, useful, flops = json.loads(found.stdout.splitlines()[-1])
    assert sum(calls.values()) in (4, 6, 8)  # of two layers: forward, forward again if recomputed, one or two backward
    assert copies == []
    assert scores == []
    gradients = 2 * 3 / 4 * count / 2  # of a ring of four, two in each box
    assert 2 * gradients <= network < 4.2 * gradients  # bytes of bfloat16, or float32
    assert 12 * count <= total < 12 * count + 2**30
    assert flops == pytest.approx(useful, rel=0.35)
