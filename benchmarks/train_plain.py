"""A Llama in plain PyTorch and its training loop: what `benchmarks/train.py` compares with.

Its argument is a JSON description; without one it trains a tiny model.

RMSNorm, rotary positions, grouped queries through `scaled_dot_product_attention`, SwiGLU; AdamW, gradient clipping,
gradient accumulation over micro-batches, random tokens. On a GPU: fp32 weights under bf16 autocast, fused AdamW.
"""

import json
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """Attention and feed-forward network, each behind a norm."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, self.groups = (shape[k] for k in ("hidden_size", "num_attention_heads", "num_query_groups"))
        self.channels = hidden // self.heads
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.groups) * self.channels, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * shape["ffn_hidden_size"], bias=False)
        self.down = nn.Linear(shape["ffn_hidden_size"], hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream `[b, s, h]` after the layer."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, -1, self.channels).transpose(1, 2)
        query, key, value = qkv.split((self.heads, self.groups, self.groups), dim=1)
        context = functional.scaled_dot_product_attention(
            rotated(query, cos, sin),
            rotated(key, cos, sin),
            value,
            is_causal=True,
            enable_gqa=self.groups != self.heads,
        )
        x = x + self.out(context.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Llama(nn.Module):
    """The whole decoder; `forward` returns the mean loss."""

    def __init__(self, shape: dict[str, Any], seq_length: int) -> None:
        super().__init__()
        rows = -(-shape["vocab_size"] // 128) * 128
        self.embedding = nn.Embedding(rows, shape["hidden_size"])
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["num_layers"]))
        self.norm = nn.RMSNorm(shape["hidden_size"], eps=1e-5)
        self.head = nn.Linear(shape["hidden_size"], rows, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if not shape["untie_embeddings_and_output_weights"]:
            self.head.weight = self.embedding.weight
        channels = shape["hidden_size"] // shape["num_attention_heads"]
        frequencies = shape.get("rotary_base", 10000.0) ** (-torch.arange(0, channels, 2).float() / channels)
        angles = torch.outer(torch.arange(seq_length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean loss of predicting `ids[:, 1:]` from `ids[:, :-1]`."""
        x = self.embedding(ids[:, :-1])
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys `[b, n, s, d]` turned by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def main(description: dict[str, Any]) -> dict[str, Any]:
    """Train and return the seconds and the loss of each step, the parameters and the peak memory."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    length, micro, batch = (description[k] for k in ("seq_length", "micro_batch_size", "global_batch_size"))
    with torch.device(device):
        model = Llama(description["shape"], length)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu or None
    )
    forward = torch.compile(model) if description["compile"] else model
    seconds, losses = [], []
    for _ in range(description["steps"]):
        ids = torch.randint(description["tokens"], (batch, length + 1)).to(device)
        started = time.monotonic()
        total = 0.0
        for part in ids.split(micro):
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
                loss = forward(part) * (micro / batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        seconds.append(time.monotonic() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds, "losses": losses, "parameters": parameters, "peak_bytes": peak}


TINY = {
    "shape": {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4,
        "vocab_size": 512, "untie_embeddings_and_output_weights": True,
    },
    "seq_length": 64, "micro_batch_size": 2, "global_batch_size": 4, "steps": 3, "tokens": 300, "compile": False,
}  # fmt: skip

if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else TINY)) + "\n")
