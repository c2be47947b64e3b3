"""Multi-head latent attention: keys and values are projected from a small latent vector, which alone is cached."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.attention import Attention
from gptjax.nn.module import ParamFactory, zeros
from gptjax.nn.norms import Norm, RMSNorm
from gptjax.nn.remat import named
from gptjax.types import Array, Key, UserError


@dataclasses.dataclass(frozen=True)
class MultiHeadLatentAttention(Attention):
    """DeepSeek-V2 (arXiv:2405.04434, section 2.1) and V3. With c_s = norm(W x_s) the latent, r_s = RoPE(W' x_s) a key
    shared by all heads, and for each head n a query of two parts, q of `head_size` and p = RoPE(...) of `rope_size`:

        score_nts = scale (q_nt . K_n c_s + p_nt . r_s)        y_nt = V_n sum_s softmax(score_nt)_s c_s

    followed by an output projection. In training K_n c and V_n c are ordinary keys and values. With a cache, which has
    c and r, K_n is absorbed into the query and V_n is applied to the sum: attention over latents, with one key of
    `kv_rank + rope_size` for all heads.

    `window` is as in `Attention`; every head has its own keys, so `kv_heads` has no effect. DeepSeek's checkpoints have
    the interleaved layout of positions.
    """

    q_rank: int | None = None
    """Rank of the queries' latent. None: queries are projected from x."""
    kv_rank: int = 512
    """R, rank of the latent."""
    rope_size: int = 64
    """P, size of the rotated part of queries and keys."""
    value_size: int = 128
    """Size of a head's values."""
    norm: Norm = RMSNorm(eps=1e-6)
    """Normalisation of the latents."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("q_rank", "kv_rank", "rope_size", "value_size"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.attention.{field}: got {value}, must be at least 1")
        if self.rope_size % 2:
            raise UserError(f"model.attention.rope_size: got {self.rope_size}, must be even: positions rotate pairs")

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        ranks = ("q_rank", self.q_rank), ("kv_rank", self.kv_rank)
        return tuple(("embed", f"model.attention.{name}", rank) for name, rank in ranks if rank is not None)

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        positions: Array,
        mask: Mask = Mask(),
        cache: Array | None = None,
        *,
        bias: Array | None = None,
        encoder_output: Array | None = None,
        tokens: Array | None = None,
        first_values: Array | None = None,
        output_scale: float = 1.0,
        dropout: float = 0.0,
        key: Key | None = None,
    ) -> tuple[Array, Array | None]:
        rules, width = param.rules, x.shape[-1]
        N, H = self._sizes()
        R, P, V = self.kv_rank, self.rope_size, self.value_size
        whole, heads = rules("batch", "sequence", None), rules("batch", "sequence", "heads", None)

        def compress(name: str, x: Array, size: int) -> Array:
            y = linear(x, param(name, (x.shape[-1], size), ("embed", None)), whole)
            return y + param(f"{name}_bias", (size,), (None,), zeros) if self.bias else y

        def turn(x: Array) -> Array:
            return self.positions.rotate(x, positions) if self.positions is not None and encoder_output is None else x

        read = x if encoder_output is None else encoder_output
        latent = self.norm(param.scope("kv_norm"), compress("kv_latent", read, R))
        shared = turn(compress("k_rope", read, P)[:, :, None])[:, :, 0]
        if self.q_rank is not None:
            x = self.norm(param.scope("q_norm"), compress("q_latent", x, self.q_rank))
        q = named(linear(x, param("q", (x.shape[-1], N, H + P), ("embed", "heads", None)), heads), "queries")
        q, turned = q[..., :H], turn(q[..., H:])
        to_key = param("k", (R, N, H), ("embed", "heads", None))
        to_value = param("v", (R, N, V), ("embed", "heads", None))

        if cache is None:
            shared = jnp.broadcast_to(shared[:, :, None], (*shared.shape[:2], N, P), out_sharding=heads)
            k = named(jnp.concatenate([linear(latent, to_key, heads), shared], -1), "keys")
            v = named(linear(latent, to_value, heads), "values")
        else:
            q = jnp.einsum("BTNH,RNH->BTNR", q, to_key, out_sharding=heads)
            entry: Array = kv.write(cache, jnp.concatenate([latent, shared], -1), mask)
            cache, k, v = entry, entry[:, :, None], entry[:, :, None]
        if self.window is not None:
            mask = dataclasses.replace(mask, window=self.window)
        y = attention(
            *(jnp.concatenate([q, turned], -1), k, v, mask),
            bias=bias,
            scale=self.multiplier(H),
            dropout=dropout,
            key=key,
        )
        if cache is not None:  # dropping the sum over the shared keys afterwards is cheaper than slicing the keys
            y = jnp.einsum("BTNR,RNV->BTNV", y[..., :R], to_value, out_sharding=heads)
        init = jax.nn.initializers.normal(0.02 * output_scale)
        o = param("o", (N, V, width), ("heads", None, "embed"), init, inputs=2)
        y = linear(y, o, whole, contract=2)
        return y + param("o_bias", (width,), (None,), zeros) if self.bias else y, cache

    def init_cache(
        self, batch: int, size: int, width: int, dtype: str = "float32", rules: ShardingRules = ShardingRules()
    ) -> Array:
        """[B, S, R + P]: latents and shared keys, the layout in which attention reads them."""
        shape = batch, size, self.kv_rank + self.rope_size
        return jnp.zeros(shape, dtype, out_sharding=rules("batch", None, None))

    def matmul_params(self, width: int, length: int) -> int:
        N, H = self._sizes()
        R, P, V = self.kv_rank, self.rope_size, self.value_size
        queries = N * (H + P) * width if self.q_rank is None else self.q_rank * (width + N * (H + P))
        projections = queries + width * (R + P) + R * N * (H + V) + N * V * width
        return projections + N * (H + P + V) * min(length, self.window or length)

    def multiplier(self, head_size: int) -> float:
        return super().multiplier(head_size + self.rope_size)

    def _sizes(self) -> tuple[int, int]:
        if self.heads is None or self.head_size is None:
            raise UserError("attention: got no heads or head_size; outside a model both must be given")
        return self.heads, self.head_size
