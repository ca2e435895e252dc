"""What tools/gpu_step.py counts of a program for a GPU; a small one is written out."""

from pathlib import Path

import pytest

from sora_jax.plan import hlo

TEXT = """
%sliced (p0: f32[30,8,4], p1: s32[], p2: bf16[30,8,4]) -> bf16[30,8,4] {
  %p0 = f32[30,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,4}
  %half = bf16[1,8,4]{2,1,0} convert(%one)
  %p2 = bf16[30,8,4]{2,1,0} parameter(2)
  ROOT %put = bf16[30,8,4]{2,1,0} dynamic-update-slice(%p2, %half, %p1, %p1, %p1)
}

%body (state: (s32[], f32[30,8,4], bf16[30,8,4])) -> (s32[], f32[30,8,4], bf16[30,8,4]) {
  %state = (s32[], f32[30,8,4]{2,1,0}, bf16[30,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %from = f32[30,8,4]{2,1,0} get-tuple-element(%state), index=1
  %into = bf16[30,8,4]{2,1,0} get-tuple-element(%state), index=2
  %fusion = bf16[30,8,4]{2,1,0} fusion(%from, %i, %into), kind=kLoop, calls=%sliced
  ROOT %next = (s32[], f32[30,8,4]{2,1,0}, bf16[30,8,4]{2,1,0}) tuple(%i, %from, %fusion)
}

%condition (state: (s32[], f32[30,8,4], bf16[30,8,4])) -> pred[] {
  %state = (s32[], f32[30,8,4]{2,1,0}, bf16[30,8,4]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: bf16[512,256], b: bf16[256,128], q: bf16[2,1024,3,64], k: bf16[2,512,3,64]) -> f32[] {
  %a = bf16[512,256]{1,0} parameter(0)
  %b = bf16[256,128]{1,0} parameter(1)
  %q = bf16[2,1024,3,64]{3,2,1,0} parameter(2)
  %k = bf16[2,512,3,64]{3,2,1,0} parameter(3)
  %product = (bf16[512,128]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %attend = (bf16[2,3,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[2,3,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %begin = (s32[], f32[30,8,4]{2,1,0}, bf16[30,8,4]{2,1,0}) constant(0)
  %loop = (s32[], f32[30,8,4]{2,1,0}, bf16[30,8,4]{2,1,0}) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  ROOT %zero = f32[] constant(0)
}
"""  # noqa: E501


@pytest.fixture
def step(load_tool, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    return load_tool("gpu_step")


def test_slices_count_and_not_the_arrays_that_they_are_of(step):
    found = {i.name: (kind, *told) for kind, _, *told, i in step.kernels(hlo.parse(TEXT))}
    # One slice read in float32 and written in bfloat16, and the index; in each of 30 trips.
    assert found["fusion"] == ("passes", 30 * (8 * 4 * (4 + 2) + 4), 30)


def test_products_and_attention_take_their_flops(step):
    seconds = {i.name: took for _, took, *_, i in step.kernels(hlo.parse(TEXT))}
    flops = 2 * 512 * 128 * 256
    bytes_ = 2 * (512 * 256 + 256 * 128 + 512 * 128) + 64
    assert seconds["product"] == pytest.approx(max(flops / step.PRODUCT, bytes_ / step.BANDWIDTH))
    logits = 2 * 2 * 3 * 1024 * 512 * 64
    assert seconds["attend"] == pytest.approx(2 * logits / step.ATTENTION)
    assert seconds["back"] == pytest.approx(5 * logits / step.ATTENTION)
