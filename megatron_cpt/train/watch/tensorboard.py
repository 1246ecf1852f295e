"""TensorBoard events of a run: curves in groups over iterations and over tokens, its settings as text, saves and spikes.

`tensorboard/` has everything over iterations, `tensorboard/tokens/` losses and learning rate over consumed tokens, on
which runs of other batch sizes can be compared. A run that rolls back to an iteration makes TensorBoard drop the later
events.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.settings.fields import plain, section_fields, sections
from megatron_cpt.config.settings.schema import RunConfig

_GROUPS = {
    "loss": ("loss",),
    "optim": ("lr", "weight_decay", "grad_norm", "global_batch_size"),
    "speed": ("tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "memory_bytes"),
    "time": ("step_seconds", "data_seconds", "forward_backward_seconds", "optimizer_seconds", "checkpoint_seconds"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_NO_CURVE = ("iteration", "consumed_samples", "consumed_tokens", "eta_seconds", "walltime_left_seconds")
"""Places and countdowns."""
_OVER_TOKENS = ("loss/", "bits_per_byte/", "optim/lr")
_EVENTS = {"save": "seconds", "spike": "loss", "rollback": "skipped"}
"""Kind of record -> the value that marks it."""


class Events:
    """Writes records of a run as TensorBoard events."""

    def __init__(self, folder: Path, config: RunConfig, iteration: int, consumed_tokens: int):
        self._folder = folder
        self._open(iteration, consumed_tokens)
        self._by_iteration.add_text("config", _settings_text(config), iteration)

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Add the curves of a record of training or validation, the mark of a save, a spike or a roll-back."""
        iteration = int(values.get("iteration") or 0)
        if kind == "rollback":
            self.close()
            self._open(iteration, int(values.get("consumed_tokens") or 0))
        if kind in _EVENTS:
            value = values.get(_EVENTS[kind])
            self._by_iteration.add_scalar(f"events/{kind}", value if isinstance(value, int | float) else 1, iteration)
        if kind not in ("train", "validation"):
            return
        for name, value in values.items():
            if name in _NO_CURVE or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            tag = f"{name}/{values['corpus']}" if kind == "validation" else f"{_GROUP_OF.get(name, 'train')}/{name}"
            self._by_iteration.add_scalar(tag, value, iteration)
            if tag.startswith(_OVER_TOKENS):
                self._by_tokens.add_scalar(tag, value, values["consumed_tokens"])

    def close(self) -> None:
        """Flush and close the files."""
        self._by_iteration.close()
        self._by_tokens.close()

    def _open(self, iteration: int, consumed_tokens: int) -> None:
        """Open event files that take the place of events after an iteration."""
        # imported here: it costs a second, and only one rank needs it
        from torch.utils.tensorboard import SummaryWriter

        def writer(folder: Path, last: int) -> Any:
            return SummaryWriter(str(folder), max_queue=100, flush_secs=30, purge_step=last + 1 if last else 0)

        self._by_iteration = writer(self._folder, iteration)
        self._by_tokens = writer(self._folder / "tokens", consumed_tokens)


def _settings_text(config: RunConfig) -> str:
    """Return the settings as a block of YAML, as TensorBoard's Markdown has it."""
    values = {
        section: {name: plain(getattr(getattr(config, section), name)) for name in section_fields(kind)}
        for section, kind in sections().items()
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return "".join(f"    {line}\n" for line in text.splitlines())
