"""Proof that a converted model computes the same: both models on the same tokens, a layer at a time, in fp32.

Each layer is built alone, once by transformers and once by megatron-core, given its weights, run on the hidden states of
its own side and thrown away; memory holds two layers, the embedding and the logits. The report names the layer at which
the two part ways, if they do.
"""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.mcore import manifest_model, read_manifest
from megatron_cpt.checkpoint.torch_dist.weights import is_extra_state
from megatron_cpt.config.megatron.arguments import megatron_arguments
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig, TrainingConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
from megatron_cpt.train.model.build import CptGPTModel, set_latent_epsilon, set_rotary_frequencies, transformer_config
from megatron_cpt.train.model.layer_spec import build_layer_spec
from megatron_cpt.train.state.approved import load_approved


@dataclass(frozen=True)
class LogitReport:
    """How far the logits and the losses of two models are apart."""

    max_difference: float
    mean_difference: float
    hf_loss: float
    megatron_loss: float
    layer_differences: list[float]
    """Mean |difference| of the hidden states after each layer, over their mean magnitude."""

    def table(self) -> str:
        """Return the report as lines."""
        worst = max(range(len(self.layer_differences)), key=self.layer_differences.__getitem__)
        return (
            f"logits |difference|: max {self.max_difference:.3e}, mean {self.mean_difference:.3e}\n"
            f"loss: Hugging Face {self.hf_loss:.6f}, Megatron {self.megatron_loss:.6f}, "
            f"difference {abs(self.hf_loss - self.megatron_loss):.3e}\n"
            f"largest relative difference after a layer: {self.layer_differences[worst]:.3e} (layer {worst})\n"
        )


def compare_logits(hf_dir: Path, checkpoint: Path, tokens: torch.Tensor, tolerance: float) -> LogitReport:
    """Return how the two models differ on `tokens` [b, s].

    Raises: CheckpointError when the mean |logit difference| exceeds `tolerance`.
    """
    disable_progress_bar()
    folder, reader = HFFolder(hf_dir), DcpReader(checkpoint)
    model = manifest_model(read_manifest(checkpoint), checkpoint)
    hf_hidden = folder.read("model.embed_tokens.weight").float()[tokens]
    embedding = reader.read("embedding.word_embeddings.weight").float()
    hidden = embedding[tokens].transpose(0, 1).contiguous()  # [s, b, h]
    differences = []
    initialize_parallel(_run_config(model, tokens.shape[1]))
    try:
        with torch.no_grad():
            for layer in range(model.num_layers):
                hf_hidden = _run_hf_layer(folder, model, layer, hf_hidden)
                hidden = _run_megatron_layer(checkpoint, model, layer, hidden)
                apart = (hf_hidden - hidden.transpose(0, 1)).abs().mean() / hf_hidden.abs().mean()
                differences.append(apart.item())
    finally:
        finish_parallel()
    is_tied = not model.untie_embeddings_and_output_weights
    output = embedding if is_tied else reader.read("output_layer.weight").float()
    norm = reader.read("decoder.final_layernorm.weight").float()
    logits = _head(hidden.transpose(0, 1), norm, output[: model.vocab_size], model)
    hf_output = folder.read("model.embed_tokens.weight" if is_tied else "lm_head.weight").float()
    hf_logits = _head(hf_hidden, folder.read("model.norm.weight").float(), hf_output, model)
    change = (logits - hf_logits).abs()
    report = LogitReport(
        change.max().item(), change.mean().item(), _loss(hf_logits, tokens), _loss(logits, tokens), differences
    )
    if not report.mean_difference <= tolerance:
        raise CheckpointError(
            f"{checkpoint}: logits differ from {hf_dir}'s by {report.mean_difference:.3e} on average, more than "
            f"{tolerance:g}. The conversion or the model's settings are wrong.\n{report.table().rstrip()}"
        )
    return report


def _run_config(model: ModelConfig, seq_length: int) -> RunConfig:
    training = TrainingConfig(
        seq_length=seq_length, precision="fp32", train_iters=1, global_batch_size=1, micro_batch_size=1
    )
    return RunConfig(task="verify", params="verify", size="verify", model=model, training=training)


def _is_moe(model: ModelConfig, layer: int) -> bool:
    return model.num_moe_experts is not None and layer >= model.moe_num_dense_layers


def _run_megatron_layer(checkpoint: Path, model: ModelConfig, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [s, b, h] after megatron-core's layer."""
    alone = dataclasses.replace(model, num_layers=1, moe_num_dense_layers=0, attention_dropout=0.0)
    if not _is_moe(model, layer):
        alone = dataclasses.replace(alone, num_moe_experts=None)
    config = _run_config(alone, hidden.shape[0])
    megatron_config = transformer_config(config)
    chunk = CptGPTModel(
        config=megatron_config,
        transformer_layer_spec=build_layer_spec(megatron_config, None),
        pre_process=False,
        post_process=False,
        **megatron_arguments(config, "GPTModel"),
    )
    set_rotary_frequencies(chunk, model)
    set_latent_epsilon(chunk, model)
    state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    state = {name: value for name, value in state.items() if not is_extra_state(name)}
    apply_prefix_mapping(state, {"decoder.layers.0.": f"decoder.layers.{layer}."})
    chunk.load_state_dict(load_approved(state, checkpoint), strict=False)
    chunk.eval()
    chunk.set_input_tensor(hidden)
    length, batch = hidden.shape[:2]
    positions = torch.arange(length)
    mask = None
    if model.window_size is not None:
        distance = positions[:, None] - positions
        mask = ((distance >= 0) & (distance < model.window_size)).expand(batch, 1, length, length)
    return chunk(None, positions.expand(batch, length), mask)


def _run_hf_layer(folder: HFFolder, model: ModelConfig, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [b, s, h] after transformers' layer."""
    config = {**folder.config, "num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": True}
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer]]
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 0 if _is_moe(model, layer) else 1
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = [] if _is_moe(model, layer) else [0]
    prefix = f"model.layers.{layer}."
    tensors = {
        name.replace(prefix, "model.layers.0.", 1): folder.read(name)
        for name in folder.names()
        if name.startswith(prefix)
    }
    blank = torch.ones(1, model.hidden_size, dtype=hidden.dtype)
    tensors |= {"model.embed_tokens.weight": blank, "model.norm.weight": blank[0].clone()}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, Path(scratch) / "model.safetensors", {"format": "pt"})
        alone = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        ).eval()
    captured: list[Any] = []
    alone.model.layers[0].register_forward_hook(lambda module, inputs, output: captured.append(output))
    alone.model(inputs_embeds=hidden, use_cache=False)
    return captured[0] if isinstance(captured[0], torch.Tensor) else captured[0][0]


def _head(hidden: torch.Tensor, norm: torch.Tensor, output: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return logits [b, s, v] of hidden states: RMSNorm and the output layer."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + model.layernorm_epsilon)
    return (hidden * scale * norm) @ output.T


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def text_tokens(hf_dir: Path, text: Path | None, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Return tokens [1, s]: the first of `text` by the folder's tokenizer, or random ones without `text`."""
    if text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab_size, (1, num_tokens), generator=generator)
    from megatron_cpt.evaluate.models.language_model import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(hf_dir)
    ids = tokenizer(text.read_text(encoding="utf-8")[: num_tokens * 20])["input_ids"][:num_tokens]
    if len(ids) < 2:
        raise CheckpointError(f"{text}: {len(ids)} tokens. Two at least are needed. Use a longer text.")
    return torch.tensor([ids])
