"""Output of a run: one aligned console line and one JSON record per logged step, and TensorBoard events."""

import json
import logging
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig
from megatron_cpt.files import naming
from megatron_cpt.log import format_bytes, format_count, format_seconds
from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.watch.tensorboard import Events
from megatron_cpt.train.watch.wandb_run import start_wandb

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 16

# Dense bf16 peak in FLOP/s by a part of the device name, the first that fits. Source: NVIDIA data sheets, without sparsity.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


class MetricsWriter:
    """Appends records to `metrics.jsonl`, TensorBoard and W&B; on ranks other than 0 it does nothing.

    A run that resumes at `iteration` (0: from its start), or rolls back to one, repeats the later iterations.
    TensorBoard is told to forget that part; W&B draws over `iteration`, since what is logged for an earlier step of its
    own it drops.
    """

    def __init__(
        self, run: RunDir, *, is_writer: bool, config: RunConfig, iteration: int = 0, consumed_tokens: int = 0
    ):
        self.is_writer = is_writer
        self._path = run.metrics_path
        self._file = None
        self._events: Events | None = None
        self._wandb: Any = None
        if not is_writer:
            return
        run.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(run.metrics_path)
        self._file = run.metrics_path.open("a", encoding="utf-8")
        if config.logging.wandb_project is not None:
            self._wandb = start_wandb(run, config)
        if config.logging.tensorboard:
            self._events = Events(run.tensorboard, config, iteration, consumed_tokens)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record of `kind` with the current time. JSON has no NaN and no infinity: they become null."""
        if self._file is None:
            return
        record = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        with naming(self._path):
            self._file.write(json.dumps({"kind": kind, **record, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.write(kind, values)
        if self._wandb is None or kind not in ("train", "validation"):
            return
        group = f"validation/{values['corpus']}" if kind == "validation" else "train"
        scalars = {
            f"{group}/{name}": value
            for name, value in values.items()
            if name not in ("iteration", "consumed_samples", "consumed_tokens") and isinstance(value, int | float)
        }
        place = {name: values[name] for name in ("iteration", "consumed_tokens")}
        self._wandb.log({**scalars, **place})

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _end_last_line(path: Path) -> None:
    """Drop a record that a killed process left half written, so that the next one starts on a line of its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = place = file.seek(0, os.SEEK_END)
        while place:  # from the end: a run of a million steps has 300 MB of records
            start = max(place - _BLOCK_BYTES, 0)
            file.seek(start)
            newline = file.read(place - start).rfind(b"\n")
            if newline >= 0:
                place = start + newline + 1
                break
            place = start
        if place < size:
            file.truncate(place)


def train_line(record: dict[str, Any], train_iters: int) -> str:
    """Return the console line of a logged step, its columns aligned over a run."""
    width = len(str(train_iters))
    parts = [
        f"iteration {record['iteration']:>{width}}/{train_iters}",
        f"tokens {format_count(record['consumed_tokens']):>6}",
        f"loss {record['loss']:7.4f}",
        f"lr {record['lr']:.3e}",
        f"grad norm {record['grad_norm']:7.3f}",
        f"{format_count(record['tokens_per_second']):>6} tokens/s",
        f"{format_count(record['tokens_per_second_per_gpu']):>6}/GPU",
        f"{record['tflops_per_gpu']:8.3g} TFLOP/s/GPU",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:5.1%}")
    parts += [f"{format_bytes(record['memory_bytes']):>9}", f"data {record['data_seconds'] * 1000:3.0f} ms"]
    eta = f"ETA {format_seconds(record['eta_seconds'])}"
    if record.get("walltime_left_seconds") is not None:
        eta += f", walltime {format_seconds(record['walltime_left_seconds'])}"
    return " | ".join([*parts, eta])


def peak_memory_bytes() -> int:
    """Return the most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Return floating-point operations of one token's forward and backward pass (3 x forward).

    Matrix products count 2 per multiply-add; attention counts the causal half. Recomputation does not count.

    Source: PaLM, arXiv:2204.02311, appendix B; Megatron-LM `training/training.py`, `num_floating_point_operations`.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.multi_latent_attention:
        query_dim = model.qk_head_dim + model.qk_pos_emb_head_dim
        rank = model.q_lora_rank
        query = hidden * rank + rank * heads * query_dim if rank else hidden * heads * query_dim
        down = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
        up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
        projections = query + down + up + heads * model.v_head_dim * hidden
        attention = heads * (query_dim + model.v_head_dim) * seq_length / 2
    else:
        channels = kv_channels(model)
        projections = hidden * channels * (2 * heads + 2 * num_query_groups(model))
        attention = heads * 2 * channels * min(seq_length, 2 * (model.window_size or seq_length)) / 2
    dense = 3 * hidden * model.ffn_hidden_size
    layers = model.num_layers * (projections + attention)
    if model.num_moe_experts is None:
        layers += model.num_layers * dense
    else:
        routed = 3 * hidden * (model.moe_ffn_hidden_size or model.ffn_hidden_size) * model.moe_router_topk
        shared = 3 * hidden * (model.moe_shared_expert_intermediate_size or 0)
        sparse = routed + shared + hidden * model.num_moe_experts
        layers += model.moe_num_dense_layers * dense + (model.num_layers - model.moe_num_dense_layers) * sparse
    return 3 * 2 * (layers + hidden * padded_vocab_size(model))


def peak_flops() -> float | None:
    """Return this device's dense bf16 peak in FLOP/s, None when it is not known (a CPU, an unlisted GPU)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for device, peak in PEAK_FLOPS.items() if device in name), None)
