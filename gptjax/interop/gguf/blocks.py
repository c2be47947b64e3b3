"""ggml's quantised blocks: 32 values, or 256 in 8 or 16 sub-blocks whose scales are themselves integers ("K").

Each `read_` takes blocks [B] and returns float32 [B, 32] or [B, 256]; each `write_` is its inverse, up to rounding. A
byte with two numbers holds those of positions i and i + 16 in blocks of 32, i and i + 32 in a group of 64 of "K", the
lower half first. d and m are the scale and the offset: x = d q + m, or d q - m in "K".
"""

from __future__ import annotations

import numpy as np

from gptjax.interop.quantised import E2M1

HALF = "<f2"
Q4_0 = np.dtype([("d", HALF), ("q", "u1", 16)])
Q4_1 = np.dtype([("d", HALF), ("m", HALF), ("q", "u1", 16)])
Q5_0 = np.dtype([("d", HALF), ("high", "u1", 4), ("q", "u1", 16)])
Q5_1 = np.dtype([("d", HALF), ("m", HALF), ("high", "u1", 4), ("q", "u1", 16)])
Q8_0 = np.dtype([("d", HALF), ("q", "i1", 32)])
Q2_K = np.dtype([("scales", "u1", 16), ("q", "u1", 64), ("d", HALF), ("m", HALF)])
Q3_K = np.dtype([("high", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), ("d", HALF)])
Q4_K = np.dtype([("d", HALF), ("m", HALF), ("scales", "u1", 12), ("q", "u1", 128)])
Q5_K = np.dtype([("d", HALF), ("m", HALF), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)])
Q6_K = np.dtype([("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", HALF)])
MXFP4 = np.dtype([("scale", "u1"), ("q", "u1", 16)])
MAGNITUDES = np.array([*E2M1, *(-x for x in E2M1)], np.float32)


def read_q4_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * (_nibbles(b["q"]) - np.float32(8))


def write_q4_0(x: np.ndarray) -> np.ndarray:
    """d = -v / 8 with v the value of largest magnitude, so that v itself is exact but for d's rounding;
    q = x / d + 8, rounded to nearest, at most 15."""
    out = np.empty(len(x), Q4_0)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    d = largest / np.float32(-8)
    q = np.trunc(x * _inverse(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    out["d"], out["q"] = d[:, 0], q[:, :16] | q[:, 16:] << 4
    return out


def read_q4_1(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * _nibbles(b["q"]) + _column(b["m"])


def read_q5_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * (_nibbles(b["q"]) + 16 * _bits(b["high"]) - np.float32(16))


def read_q5_1(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * (_nibbles(b["q"]) + 16 * _bits(b["high"])) + _column(b["m"])


def read_q8_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * b["q"]


def write_q8_0(x: np.ndarray) -> np.ndarray:
    """d = max|x| / 127; q = x / d rounded to nearest, halves away from zero, before d is itself rounded to float16."""
    out = np.empty(len(x), Q8_0)
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    values = x * _inverse(d)
    # Adding 0.5 itself would round the number just below 0.5 up to 1.
    values += np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), values)
    out["d"], out["q"] = d[:, 0], values  # truncated towards zero
    return out


def read_q2_k(b: np.ndarray) -> np.ndarray:
    scales, offsets = _column(b["d"]) * (b["scales"] & 15), _column(b["m"]) * (b["scales"] >> 4)
    return _scaled(_crumbs(b["q"]), scales, offsets)


def read_q3_k(b: np.ndarray) -> np.ndarray:
    """The third bit says not to subtract 4. A scale has 6 bits: four of the first 8 bytes, two of the last 4."""
    s = b["scales"]
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], -1)
    high = np.concatenate([s[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    scales = _column(b["d"]) * ((low | high << 4).astype(np.float32) - 32)
    third = (b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), 256)
    return _scaled(_crumbs(b["q"]) - 4 * (1 - third.astype(np.float32)), scales)


def read_q4_k(b: np.ndarray) -> np.ndarray:
    return _scaled(_halves(b["q"]), *_scales_and_offsets(b))


def read_q5_k(b: np.ndarray) -> np.ndarray:
    fifth = (b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), 256)
    return _scaled(_halves(b["q"]) + 16 * fifth.astype(np.float32), *_scales_and_offsets(b))


def read_q6_k(b: np.ndarray) -> np.ndarray:
    """Each 128 values: four groups of 32 share a byte of `high`, and two of them a byte of `q`."""
    q, high = b["q"].reshape(-1, 2, 64), b["high"].reshape(-1, 2, 1, 32)
    low = np.concatenate([q & 15, q >> 4], -1)
    top = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = low | (top << 4).reshape(low.shape)
    return _scaled(values.reshape(len(b), 256) - np.float32(32), _column(b["d"]) * b["scales"])


def read_mxfp4(b: np.ndarray) -> np.ndarray:
    """E2M1 times 2^(scale - 127): https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf"""
    q = b["q"]
    numbers = MAGNITUDES[np.concatenate([q & 15, q >> 4], -1)]
    return np.ldexp(numbers, b["scale"][:, None].astype(np.int32) - 127)


def _column(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)[:, None]


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d; 0 for a d without an inverse, which float16 cannot hold: then no value matters."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) >= np.finfo(np.float32).tiny)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [B, 16] -> float32 [B, 32]."""
    return np.concatenate([q & 15, q >> 4], -1).astype(np.float32)


def _bits(high: np.ndarray) -> np.ndarray:
    """uint8 [B, 4] -> float32 [B, 32] of bits, the lowest first."""
    return np.unpackbits(high, axis=-1, bitorder="little").astype(np.float32)


def _crumbs(q: np.ndarray) -> np.ndarray:
    """uint8 [B, 64] -> float32 [B, 256] of two bits; of each 128 values, four groups of 32 share their bytes."""
    groups = q.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return groups.reshape(len(q), 256).astype(np.float32)


def _halves(q: np.ndarray) -> np.ndarray:
    """uint8 [B, 128] -> float32 [B, 256] of four bits; of each 64 values, two groups of 32 share their bytes."""
    groups = q.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    return groups.reshape(len(q), 256).astype(np.float32)


def _scales_and_offsets(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets of the 8 sub-blocks, of 6 bits: the first four are in a byte of their own, whose two highest
    bits complete the last four."""
    first, second, third = (b["scales"][:, i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, (third & 15) | first >> 6 << 4], -1)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
    return _column(b["d"]) * scales, _column(b["m"]) * offsets


def _scaled(values: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """values [B, 256] times the scales [B, S] of their sub-blocks, less the offsets."""
    parts = values.reshape(*scales.shape, -1) * scales[..., None]
    if offsets is not None:
        parts -= offsets[..., None]
    return parts.reshape(values.shape)
