"""Weights stored in 8 or 4 bits with block scales, made into ordinary ones exactly as transformers does.

- fp8 (DeepSeek-V3, Kimi K2): `X.weight` in float8 and `X.weight_scale_inv`, a scale for each block of `weight_block_size`. The
  last block of a row or column holds what is left (576 rows are 4.5 blocks of 128).
- mxfp4 (GPT-OSS): `X_blocks` `[e, f, g, b]` of two 4-bit values per byte and `X_scales` `[e, f, g]`, powers of two, are the
  tensor `X` `[e, 2gb, f]`.

Source: transformers 5.23, `integrations/finegrained_fp8.py` (Fp8Dequantize), `integrations/mxfp4.py`
(convert_moe_packed_tensors); deepseek-ai/DeepSeek-V3, `inference/kernel.py` (weight_dequant).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_cpt.errors import CheckpointError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE, BLOCKS, BLOCK_SCALES = "_scale_inv", "_blocks", "_scales"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantization(config: Mapping[str, Any], where: str) -> tuple[str, tuple[int, int]] | None:
    """Return the kind (fp8 or mxfp4) of a configuration and the block of its scales, None where weights are ordinary.

    Raises: CheckpointError for kinds that are not known.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    kind = settings.get("quant_method") if isinstance(settings, dict) else None
    block = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if kind == "mxfp4":
        return kind, (1, 32)
    if kind == "fp8" and isinstance(block, Sequence) and len(block) == 2:
        return kind, (int(block[0]), int(block[1]))
    raise CheckpointError(
        f"{where}: quantization_config is {str(settings)[:120]}. Weights without it, fp8 with weight_block_size, or mxfp4 "
        "are read. Convert the model to bf16 first, or fetch its unquantized weights."
    )


def fp8_values(stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return `stored` times the scale of its block, in float32, rounded to `dtype`."""
    rows, columns = stored.shape
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (stored.float() * spread).to(dtype)


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values `[e, 2gb, f]` of packed `blocks` `[e, f, g, b]` and exponents `scales` `[e, f, g]`."""
    values = torch.tensor(_FP4, dtype=dtype)
    pairs = torch.stack((values[(blocks & 0x0F).int()], values[(blocks >> 4).int()]), dim=-1).flatten(-2)
    scaled = torch.ldexp(pairs, scales.int().unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(1, 2).contiguous()


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tensor that packed blocks hold."""
    return blocks[0], 2 * math.prod(blocks[2:]), blocks[1]
