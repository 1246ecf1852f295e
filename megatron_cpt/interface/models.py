"""Models: converted both ways, averaged, measured on text, and asked to write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.soup.mean import average_hf
from megatron_cpt.evaluate.models.folders import is_mcore_checkpoint
from megatron_cpt.evaluate.models.forgetting import Change, compare_with_first
from megatron_cpt.evaluate.models.generation import continuations
from megatron_cpt.evaluate.models.language_model import loaded_model
from megatron_cpt.evaluate.models.perplexity import Perplexity, measure_perplexity
from megatron_cpt.evaluate.models.texts import read_text_set
from megatron_cpt.interface.html import html_table

Models = Mapping[str, str | Path]


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte of models on texts, and the changes from the first model."""

    results: list[Perplexity]
    changes: list[Change]

    def bits_per_byte(self, model: str, text: str) -> float:
        """Return a model's bits per byte on a text."""
        return next(found.bits_per_byte for found in self.results if (found.model, found.text) == (model, text))

    def _repr_html_(self) -> str:
        rows = [
            (
                change.model,
                change.text,
                f"{change.bits_per_byte:.4f}",
                f"{change.low:.4f} to {change.high:.4f}",
                f"{change.change:+.4f}",
                change.verdict if change.model != self.changes[0].model else "reference",
            )
            for change in self.changes
        ]
        return html_table(("model", "text", "bits per byte", "95 % interval", "change", ""), rows)


@dataclass(frozen=True)
class Generated:
    """Continuations of prompts: `texts[model][i]` follows `prompts[i]`."""

    prompts: list[str]
    texts: dict[str, list[str]]

    def _repr_html_(self) -> str:
        rows = [
            (prompt, *(self.texts[name][index] for name in self.texts)) for index, prompt in enumerate(self.prompts)
        ]
        return html_table(("prompt", *self.texts), rows)


def convert(
    source: str | Path, output: str | Path, *, tokenizer: str | Path | None = None, verify: bool = False, **options: Any
) -> Path:
    """Convert a Hugging Face folder to a Megatron checkpoint or back, depending on the format of `source`; return the
    output folder.

    `options` are the fields of `ImportChoices` or `ExportChoices`, such as dtype="bf16".
    """
    if is_mcore_checkpoint(Path(source)):
        place = None if tokenizer is None else Path(tokenizer)
        export = ExportChoices(tokenizer=place, **options)
        return mcore_to_hf(Path(source), Path(output), options=export, verify=verify)
    return hf_to_mcore(Path(source), Path(output), options=ImportChoices(**options), verify=verify)


def soup(
    models: Sequence[str | Path],
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write the (weighted) mean of Hugging Face folders to `output`; return it."""
    place = None if base is None else Path(base)
    return average_hf([Path(model) for model in models], Path(output), weights=weights, base=place)


def evaluate(
    models: Models,
    *,
    texts: Mapping[str, str | Path],
    tokenizer: str | Path | None = None,
    context: int | None = None,
    max_documents: int | None = None,
) -> Evaluation:
    """Measure models (name -> folder or checkpoint) on texts (name -> documents); changes are from the first model."""
    sets = [read_text_set(name, [Path(path)], max_documents) for name, path in texts.items()]
    results = []
    for name, path in models.items():
        with loaded_model(name, Path(path), None if tokenizer is None else Path(tokenizer)) as model:
            results += [measure_perplexity(model, text, context=context) for text in sets]
    return Evaluation(results, compare_with_first(results))


def generate(
    models: Models,
    prompts: Sequence[str],
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 1234,
    tokenizer: str | Path | None = None,
) -> Generated:
    """Return what each model (name -> folder or checkpoint) writes after each prompt, side by side."""
    texts = {}
    for name, path in models.items():
        with loaded_model(name, Path(path), None if tokenizer is None else Path(tokenizer)) as model:
            texts[name] = continuations(model, prompts, num_tokens=tokens, temperature=temperature, seed=seed)
    return Generated(list(prompts), texts)
