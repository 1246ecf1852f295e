"""AuroraGPT's CPT cookbook in small: four stages, three ways from prose to source, and what each forgot.

python -m tasks.aurora-cpt.mini [--short] [--clean]
"""

import itertools
import json
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.data.blend.replay import read_buffer
from tasks.mini.recipe import (
    BASE_HF,
    TEXTS,
    TOKENIZER,
    Recipe,
    base_steps,
    learning_rates,
    main,
    require,
    require_lower,
    validation,
)
from tasks.mini.steps import ROOT, Command, Step, checked, cpt, exists, is_finished, run_command, step

RECIPE = Recipe("aurora-cpt", "tasks/mini/params/mini-3m.yaml")
LR_FACTOR = 10
"""A model of three million parameters takes ten times the rates of one of seven billion."""
NEXT_RUNG = "D1+replay-0.1"
STAGES = ("D0", "D1", "D2", "D3")
NAMES = {"D0": "prose", "D1": "code", "D2": "math", "D3": "reasoning"}


def steps(recipe: Recipe) -> list[Step]:
    """Return the recipe as a list of steps."""
    texts = validation(*NAMES.values())
    if recipe.short:
        return [
            *beginning(recipe),
            train(recipe, "Stage 1 (D0), at its held rate before any cooldown", "D0"),
            train(recipe, "Stage 2 (D1) from there, with replay", "D1"),
            checked("The buffer holds what the stages drew", lambda: check_buffer(recipe, ("D0", "D1"))),
            checked("The learning rate goes on where the stage before held it", lambda: check_rates(recipe)),
        ]
    lists = recipe.data / "lists"
    last = {stage: recipe.exported(stage) for stage in STAGES}
    ways = {name: recipe.exported(name) for name in ("D0", "D1-no-replay", "D1", NEXT_RUNG, "reuse-D1", "legacy-D1")}
    return [
        *beginning(recipe),
        train(recipe, "Stage 1 (D0): infinite schedule, stopped at its held rate", "D0"),
        train(recipe, "What is released of stage 1: a fork of it that cools down", "D0-cooldown"),
        train(recipe, "Stage 2 (D1) forks before the cooldown: 5 % replay of D0", "D1"),
        recipe.plan("Stage 3 draws from the buffer what stage 2 put there", "D2"),
        train(recipe, "Stage 3 (D2): D0, the new data and the buffer", "D2"),
        train(recipe, "Stage 4 (D3): the same, with the cooldown that ends the chain", "D3"),
        checked("The buffer holds what the stages drew", lambda: check_buffer(recipe, STAGES)),
        train(recipe, "Stage 2 without replay", "D1-no-replay"),
        step(
            "The cookbook as a tool: is stage 2 recovering, and what would be next?",
            [
                cpt("advise", recipe.run("D1"), "--output", recipe.evaluation / "advice-D1.json"),
                cpt("advise", recipe.run("D1-no-replay"), "--output", recipe.evaluation / "advice-no-replay.json"),
            ],
            exists(recipe.evaluation / "advice-no-replay.json"),
            check=lambda: check_advice(recipe),
        ),
        step(
            "The ladder's next rung, by the command that the advice prints",
            [cpt("advise", recipe.run("D1"), "--output", recipe.evaluation / "advice-D1.json")],
            lambda: is_finished(recipe.run(NEXT_RUNG)),
            run=lambda command: run_advised(command, recipe.evaluation / "advice-D1.json"),
        ),
        train(
            recipe,
            "Reuse, don't retrain: decay on D0 to LR_max/5, then D1 mixed in, to LR_max/100",
            "reuse-D0",
            "reuse-D1",
        ),
        train(recipe, "Legacy: a base that a cosine took to zero", "legacy-D0"),
        step(
            "Legacy: the mix as Aurora's script makes it, full precision",
            [
                *(
                    cpt(
                        *("blend", "list", recipe.data / f"tokens/{name}_text_document", "--format", "blendcorpus"),
                        *("--output", lists / f"{name}.txt"),
                    )
                    for name in ("prose", "code")
                ),
                ["tools/mix_datasets.py", "--inputs", "0.9", f"{lists}/code.txt", "0.1", f"{lists}/prose.txt"],
            ],
            exists(lists / "code.txt"),
        ),
        train(recipe, "Legacy: replay and re-warm to LR_max with a fresh optimizer", "legacy-D1"),
        checked("The learning rates are what the recipes say", lambda: check_rates(recipe)),
        recipe.export("Out: the end of every stage and way", *dict.fromkeys((*STAGES, *ways))),
        recipe.evaluate("Forgetting, stage by stage", {"base": BASE_HF, **last}, texts, "stages"),
        checked("Every stage learned its data; replay keeps some of what came before", lambda: check_stages(recipe)),
        recipe.evaluate("Prose to source, the ways compared", ways, validation("prose", "code"), "ways"),
        checked("Replay forgets less than no replay and learns the source", lambda: check_ways(recipe)),
    ]


def beginning(recipe: Recipe) -> list[Step]:
    """Return the steps up to the tokens of the four corpora."""
    tokens = recipe.data / "tokens"
    files = [TEXTS / f"{name}{part}.jsonl.zst" for name in NAMES.values() for part in ("", ".validation")]
    return [
        *base_steps(recipe.short),
        step(
            "Tokens of the four corpora and their held-out sets",
            [cpt("tokenize", "--input", *files, "--tokenizer", TOKENIZER, "--output-dir", tokens)],
            exists(tokens / "reasoning.validation_text_document.json"),
        ),
    ]


def train(recipe: Recipe, title: str, *variants: str) -> Step:
    """Return the step that trains stages with the mini's learning rates."""
    commands = [
        cpt("submit", "train", *recipe.named(v), *recipe.overrides(), *scaled_rates(recipe, v)) for v in variants
    ]
    return step(title, commands, lambda: all(is_finished(recipe.run(variant)) for variant in variants))


def scaled_rates(recipe: Recipe, variant: str) -> list[str]:
    """Return settings that scale the learning rates which the task states for its real model."""
    task = ROOT / "tasks" / recipe.task
    real = load_config(task, "auroragpt-7b", "22B", variant).config
    rates = {"optimizer.lr": real.optimizer.lr, "optimizer.min_lr": real.optimizer.min_lr}
    if real.schedule.lr_hold is not None:
        rates["schedule.lr_hold"] = real.schedule.lr_hold
    return [f"{key}={rate * LR_FACTOR:g}" for key, rate in rates.items()]


def check_buffer(recipe: Recipe, stages: tuple[str, ...]) -> str:
    """Check that the buffer names every stage of the chain and what each brought."""
    buffer = read_buffer(recipe.data / "buffer.yaml")
    ended = [Path(name).name for name in buffer.stages]
    require(set(stages) <= set(ended), f"the buffer names {', '.join(ended)}, not {', '.join(stages)}.")
    corpora = sorted({shard.corpus for shard in buffer.shards.values()})
    require(corpora == sorted(stages), f"the buffer holds {', '.join(corpora)}, not {', '.join(stages)}.")
    return f"stages {', '.join(ended)}; corpora {', '.join(corpora)}"


def check_rates(recipe: Recipe) -> str:
    """Check the learning rates at the ends of the stages that were trained."""
    peak = 2e-4 * LR_FACTOR
    held = learning_rates(recipe.run("D0"))[-1]
    first = learning_rates(recipe.run("D1"))[0]
    require(abs(held - peak / 2) < 1e-9 and first == held, f"D0 ended at {held:g}, D1 began at {first:g}.")
    if recipe.short:
        return f"D0 ended and D1 began at {held:g}"
    reuse, legacy = learning_rates(recipe.run("reuse-D1")), learning_rates(recipe.run("legacy-D1"))
    require(abs(reuse[0] - peak / 5) < 1e-9, f"reuse-D1 began at {reuse[0]:g}, not at LR_max/5.")
    require(0.99 * peak < max(legacy) <= peak, f"legacy-D1 rose to {max(legacy):g}, not to LR_max.")
    require(learning_rates(recipe.run("legacy-D0"))[-1] < peak / 50, "legacy-D0 did not decay to zero.")
    return f"held {held:g}, reuse-D1 from {reuse[0]:g} to {reuse[-1]:g}, legacy-D1 up to {max(legacy):g}"


def check_advice(recipe: Recipe) -> str:
    """Check that more replay is advised after 5 % of it and after none, where the old data's loss is the higher."""
    advice = {}
    for name in ("D1", "no-replay"):
        advice[name] = json.loads((recipe.evaluation / f"advice-{name}.json").read_text(encoding="utf-8"))
        require(advice[name]["next"] == "more replay", f"after {name} the advice is {advice[name]['next']}.")
    with_replay, without = (advice[name]["old"]["D0"]["now"] for name in ("D1", "no-replay"))
    require(with_replay < without, f"held-out D0 ended at {with_replay:.3f} with replay, at {without:.3f} without.")
    return f"held-out D0 ended at {with_replay:.3f} with replay, at {without:.3f} without; next: more replay"


def run_advised(command: Command, advice: Path) -> None:
    """Run `advise`, then the training commands that it prints."""
    run_command(command)
    for arguments in json.loads(advice.read_text(encoding="utf-8"))["commands"]:
        run_command(cpt("submit", "train", *arguments))


def check_stages(recipe: Recipe) -> str:
    """Check that each stage lowered bits per byte on its own corpus."""
    bits = recipe.bits("stages")
    order = ("base", *STAGES)
    for before, stage in itertools.pairwise(order):
        require_lower(bits, NAMES[stage], stage, before)
    return "; ".join(f"{stage} on {NAMES[stage]} {bits[stage][NAMES[stage]]:.3f}" for stage in STAGES)


def check_ways(recipe: Recipe) -> str:
    """Check the comparison of the ways from prose to source."""
    bits = recipe.bits("ways")
    for way in ("D1", "D1-no-replay", NEXT_RUNG, "reuse-D1", "legacy-D1"):
        require_lower(bits, "code", way, "D0")
    require_lower(bits, "prose", NEXT_RUNG, "D1")
    return require_lower(bits, "prose", "D1", "D1-no-replay")


if __name__ == "__main__":
    main(RECIPE, __doc__, steps)
