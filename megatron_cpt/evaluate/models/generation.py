"""Continuations of prompts by several models, printed side by side.

A continuation ends where the model ends a text or its turn of a conversation: at the tokenizer's end token, at those of the
folder's `generation_config.json`, at the token that ends an assistant's turn in the chat template, and at the usual names of
such tokens where the tokenizer has them as control tokens (a model that was tuned with a template it does not carry).
"""

import textwrap
from collections.abc import Sequence

import torch

from megatron_cpt.data.chat.template import ChatTemplate, TemplateRefusal
from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.language_model import LanguageModel

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|return|>")
"""Tokens that end a turn: ChatML and Qwen, Llama 3, Phi, Gemma, gpt-oss."""
_ANSWER = "answer"


@torch.inference_mode()
def continuations(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    template: ChatTemplate | None = None,
) -> list[str]:
    """Return what `model` writes after each prompt: the most likely tokens at temperature 0, else a sample.

    With `template`, each prompt is a user turn and the continuation is the assistant's answer.

    Raises: DataError when the template does not take a single turn of a user.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    ends = end_ids(model, template)
    texts = []
    for prompt in prompts:
        if template is None:
            given = [model.start_id, *model.encode([prompt])[0]]
        else:
            (given,) = model.encode([_rendered(template, prompt)])
        tokens = list(given)
        for _ in range(num_tokens):
            window = torch.tensor([tokens[-model.context :]], device=model.device)
            logits = model.logits(window)[0, -1].float()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item()
            else:
                chosen = logits.argmax().item()
            if int(chosen) in ends:
                break
            tokens.append(int(chosen))
        texts.append(model.tokenizer.decode(tokens)[len(model.tokenizer.decode(given)) :])
    return texts


def end_ids(model: LanguageModel, template: ChatTemplate | None = None) -> set[int]:
    """Return the tokens at which a continuation ends; without `template`, the tokenizer's own template is also used."""
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    found = {model.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    special = {id: token.content for id, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    found |= {id for id, content in special.items() if content in TURN_ENDS}
    template = template or model.template
    if template is not None:
        found.add(_turn_end(model, template, set(special)))
    return {id for id in found if id is not None}


def _turn_end(model: LanguageModel, template: ChatTemplate, special: set[int]) -> int | None:
    """Return the first control token after an assistant's answer; None where the template has none or refuses."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, found, after = template.render(template.fitted(turns)).rpartition(_ANSWER)
    except TemplateRefusal:
        return None
    return next((id for id in model.encode([after])[0] if id in special), None) if found else None


def _rendered(template: ChatTemplate, prompt: str) -> str:
    try:
        return template.render(template.fitted([{"role": "user", "content": prompt}]), add_generation_prompt=True)
    except TemplateRefusal as problem:
        raise DataError(
            f"{template.name}: does not take a user's turn alone ({problem}). Choose another --chat."
        ) from None


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
