"""The comparison of a sweep's points from their metrics."""

import json
from pathlib import Path


def write_metrics(
    run: Path,
    losses: list[float],
    held_out: dict[str, list[float]],
    *,
    rates: list[float] | None = None,
    end: str | None = "finished",
    tokens: int = 4096,
) -> None:
    """Write metrics.jsonl: a start, a record per loss, held-out losses spread evenly from iteration 0 on, an end."""
    records: list[dict] = [{"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False, "layout": "TP1"}]
    for iteration, loss in enumerate(losses, 1):
        rate = rates[iteration - 1] if rates else 2e-3
        values = {"iteration": iteration, "consumed_tokens": iteration * tokens, "loss": loss, "lr": rate}
        records.append({"kind": "train", **values, "tokens_per_second": 100.0})
    for corpus, values in held_out.items():
        for number, value in enumerate(values):
            iteration = number * len(losses) // max(len(values) - 1, 1)
            place = {"iteration": iteration, "consumed_tokens": iteration * tokens}
            records.append({"kind": "validation", **place, "corpus": corpus, "loss": value, "bits_per_byte": value})
    if end:
        records.append({"kind": "end", "iteration": len(losses), "reason": end})
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
