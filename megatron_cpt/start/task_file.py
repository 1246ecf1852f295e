"""The task file that `init` writes: corpora with sampled facts, mix, schedule, one size, and the open decisions."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_cpt.log import format_bytes, format_count
from megatron_cpt.start.look import CorpusLook
from megatron_cpt.start.params_file import inline


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Content of the task file."""

    name: str
    data_dir: Path
    tokenizer: Path
    model: Path
    tokens: str
    """As given: `1B`; the name of the size too."""
    num_tokens: int
    iterations: int
    new: Sequence[CorpusLook]
    replay: Sequence[CorpusLook]
    replay_share: float
    held_out: Mapping[str, str]
    """Part of each corpus."""


def mix_of(plan: TaskPlan) -> dict[str, float]:
    """Return each corpus's share of the stage: replay its part, within a side in proportion to the tokens there are."""
    sides = ((plan.new, 1 - plan.replay_share if plan.replay else 1.0), (plan.replay, plan.replay_share))
    mix: dict[str, float] = {}
    for side, share in sides:
        total = sum(look.tokens for look in side)
        mix |= {look.name: round(share * look.tokens / total, 4) for look in side}
    largest = max(mix, key=lambda name: mix[name])
    mix[largest] = round(mix[largest] + 1 - math.fsum(mix.values()), 4)
    return mix


def epochs_of(plan: TaskPlan, mix: Mapping[str, float]) -> dict[str, float]:
    """Return how often each corpus is read, by the estimate and without what is held out."""
    kept = {name: 1 - float(Fraction(part)) for name, part in plan.held_out.items()}
    return {
        look.name: mix[look.name] * plan.num_tokens / (look.tokens * kept[look.name])
        for look in (*plan.new, *plan.replay)
    }


def task_text(plan: TaskPlan) -> str:
    """Return the task file."""
    mix = mix_of(plan)
    epochs = epochs_of(plan, mix)
    most = max(epochs.values())
    lines = [
        f"description: {inline(f'{plan.model.name} on {plan.tokens} tokens of ' + ', '.join(look.name for look in plan.new))}",
        "",
        "# Relative paths in this file start at paths.data_dir; runs_dir and data_dir at the folder that commands are called in.",
        "paths:",
        f"  data_dir: {inline(str(plan.data_dir))}",
        "  runs_dir: runs",
        "",
        "data:",
        f"  tokenizer: {inline(seen_from(plan.data_dir, plan.tokenizer))}",
        "  corpora:",
    ]
    for look in (*plan.new, *plan.replay):
        what = "replay of what the model knows" if look in plan.replay else "new"
        lines += [
            f"    {inline(look.name)}: # {what}: {look.num_files} files, {format_bytes(look.num_bytes)}, about "
            f"{format_count(look.tokens)} tokens ({look.bytes_per_token:.2f} bytes each), read {epochs[look.name]:.2g} times",
            f"      documents: [{', '.join(inline(seen_from(plan.data_dir, Path(item))) for item in look.patterns)}]",
            f"      held_out: {plan.held_out[look.name]} # of the documents, by their hashes; measured, never trained on",
        ]
    lines += ["  # Shares of the stage's tokens; they sum to 1."]
    if not plan.replay:
        lines += [
            "  # DECIDE: without replay of text like that which the model was trained on, some of it is forgotten. Add a corpus",
            "  # with 0.05 (related text) to 0.25 (another language) of the mix; what is forgotten is measured on its held-out part.",
        ]
    elif plan.replay:
        lines += ["  # DECIDE: 0.05 of replay where the new text is close to the old, up to 0.25 where it is far."]
    lines += [f"  mix: {{{', '.join(f'{inline(name)}: {share:g}' for name, share in mix.items())}}}"]
    if most > 4:
        lines += [
            "  # DECIDE: read this often, text gives little more after some 4 times. Fewer tokens, or more text, may be better.",
            f"  max_epochs: {math.ceil(most * 1.3)}",
        ]
    save = max(plan.iterations // 10, 1)
    lines += [
        "",
        "init:",
        f"  from_path: {inline(seen_from(plan.data_dir, plan.model))}",
        "  load: weights",
        "",
        "# Warm up again, hold, cool down; fractions of the stage.",
        "schedule:",
        "  lr_decay_style: WSD",
        "  lr_warmup: 0.01",
        "  lr_cooldown: 0.2",
        "",
        f"checkpoint: {{save_interval: {save}, keep_last: 3}}",
        f"evaluation: {{eval_interval: {max(plan.iterations // 20, 1)}, eval_iters: 8}}",
        f"logging: {{log_interval: {min(max(plan.iterations // 100, 1), 10)}}}",
        "",
        "# DECIDE: how long. The name is what --size says; add more sizes below it.",
        "sizes:",
        f"  {inline(plan.tokens)}:",
        f"    training: {{train_tokens: {inline(plan.tokens)}}}",
    ]
    return "\n".join(lines) + "\n"


def seen_from(data_dir: Path, path: Path) -> str:
    """Return a path as written in a task file: an absolute path unchanged, a relative one relative to the data
    folder, where that means the same now and once the data folder is made (a link in the way of `..` leads elsewhere)."""
    relative = os.path.relpath(path, data_dir)
    is_linked = relative.startswith("..") and os.path.realpath(data_dir) != os.path.abspath(data_dir)
    return os.path.abspath(path) if path.is_absolute() or is_linked else relative
