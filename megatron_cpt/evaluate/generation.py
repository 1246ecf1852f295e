"""Continuations of prompts by several models, printed side by side."""

import textwrap
from collections.abc import Sequence

import torch

from megatron_cpt.evaluate.models import LanguageModel


@torch.inference_mode()
def continuations(
    model: LanguageModel, prompts: Sequence[str], *, num_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Return what `model` writes after each prompt: the most likely tokens at temperature 0, else a sample."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    texts = []
    for prompt in prompts:
        tokens = [model.start_id, *model.encode([prompt])[0]]
        for _ in range(num_tokens):
            window = torch.tensor([tokens[-model.context :]], device=model.device)
            logits = model.logits(window)[0, -1].float()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item()
            else:
                chosen = logits.argmax().item()
            if chosen == model.tokenizer.eos_token_id:
                break
            tokens.append(int(chosen))
        texts.append(model.tokenizer.decode(tokens[1:])[len(prompt) :])
    return texts


def side_by_side(prompts: Sequence[str], texts: dict[str, list[str]], width: int = 100) -> str:
    """Return each prompt with the continuation of every model under it, wrapped to `width` columns."""
    name_width = max(map(len, texts))
    lines = []
    for index, prompt in enumerate(prompts):
        lines.append(f"prompt: {prompt}")
        for name, continued in texts.items():
            body = continued[index].replace("\n", "\\n")
            wrapped = textwrap.wrap(body, max(width - name_width - 4, 20), drop_whitespace=False) or ["(nothing)"]
            lines += [f"  {name if not row else '':<{name_width}}  {part}" for row, part in enumerate(wrapped)]
        lines.append("")
    return "\n".join(lines)
