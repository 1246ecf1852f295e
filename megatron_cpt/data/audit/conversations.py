"""Audit of instruction data: sampled conversations, rendered and encoded again, give the ids and masks on disk.

The manifest contains template, variables and options; the provenance sidecar contains file and line of each
conversation. Of packs the pieces are compared; a text that was split over several is passed over. Of a conversation
that became a document per answer each piece has to be one of them.
"""

import datetime
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat.encode import ChatEncoder, ChatJob
from megatron_cpt.data.chat.tokens import Tokenized
from megatron_cpt.data.reading.conversations import ChatLayout, Conversation, read_piece
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.streams import pieces_of
from megatron_cpt.data.shards.indexed import ShardIndex
from megatron_cpt.data.shards.masked import PIECE, PROMPT
from megatron_cpt.data.tokenize.shard_writer import provenance_path


def check_conversations(
    index: ShardIndex,
    manifest: dict[str, Any],
    tokens: np.ndarray,
    mask: np.ndarray,
    sources: list[Source | None],
    tokenizer_path: Path,
    num_samples: int,
    seed: int,
) -> tuple[int, list[str]]:
    """Return the number of compared conversations, and the problems; `sources` are None if they changed.

    Raises: DataError when tokenizer or template cannot be used.
    """
    encoder = ChatEncoder(_job(manifest, tokenizer_path))
    encoder.tokenizer.eod_id = manifest["tokenizer"]["eod_id"]
    rows = np.load(provenance_path(index.prefix), mmap_mode="r")
    starts = np.flatnonzero(mask & PIECE)
    if len(rows) != len(starts):
        return 0, [f"{provenance_path(index.prefix)}: has {len(rows):,} rows for {len(starts):,} pieces"]
    ends = np.append(starts[1:], index.num_tokens)
    places = np.flatnonzero(rows[:, 0] >= 0) if encoder.job.unroll else _unsplit(rows)
    chosen = random.Random(seed).sample(places.tolist(), min(num_samples, len(places)))
    wanted: dict[int, dict[int, list[int]]] = {}
    for piece in chosen:
        source, line = rows[piece].tolist()
        wanted.setdefault(source, {}).setdefault(line, []).append(piece)
    compared, problems = 0, []
    for number, lines in sorted(wanted.items()):
        source = sources[number]
        if source is None:
            continue
        for line, conversation in _conversations(source, number, encoder.job.layout, lines):
            documents = encoder.encode_one(conversation)
            for piece in lines[line]:
                compared += 1
                part = slice(starts[piece], ends[piece])
                if not any(_is_same(document, tokens[part], mask[part], manifest) for document in documents):
                    problems.append(f"{source.path}:{line}: gives other ids or another mask than piece {piece:,}")
    return compared, problems


def _is_same(document: Tokenized, ids: np.ndarray, mask: np.ndarray, manifest: dict[str, Any]) -> bool:
    """Compare a document with a piece; a shard from before prompts were marked is compared without those marks."""
    marked = document.mask if "prompt" in manifest["mask"] else document.mask & ~np.uint8(PROMPT)
    return np.array_equal(document.ids, ids) and np.array_equal(marked, mask)


def _job(manifest: dict[str, Any], tokenizer_path: Path) -> ChatJob:
    options, template = manifest["options"], manifest["template"]
    date = template["date"]
    return ChatJob(
        tokenizer_path=tokenizer_path,
        layout=ChatLayout(
            message_keys=tuple(options["keys"]),
            text_key=options["text_key"],
            max_document_bytes=options["max_document_bytes"],
            on_empty_answer=options.get("on_empty_answer", "reject"),
            ignored_keys=tuple(options.get("ignored_keys", ())),
        ),
        template_text=template["text"],
        template_variables=tuple(template["variables"].items()),
        date=None if date is None else datetime.date.fromisoformat(date),
        train_on=options["train_on"],
        unroll=options.get("unroll", False),
        train_on_eos=options["train_on_eos"],
        max_length=options["max_length"],
        on_long=options["on_long"],
    )


def _unsplit(rows: np.ndarray) -> np.ndarray:
    """Return the pieces that are whole documents: no other piece is of the same line, and they are not filling."""
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    alone = np.sort(first[counts == 1])
    return alone[rows[alone, 0] >= 0]


def _conversations(
    source: Source, number: int, layout: ChatLayout, lines: dict[int, list[int]]
) -> Iterator[tuple[int, Conversation]]:
    """Yield (line, conversation) of the wanted lines of a source."""
    before, last = 0, max(lines)
    for piece in pieces_of(source, number, layout.streams()):
        found = read_piece(piece, layout)
        if piece.descriptor is not None:
            os.close(piece.descriptor)
        for conversation in found.conversations:
            line = before + conversation.line + 1
            if line in lines:
                yield line, conversation
        before += found.num_lines
        if before >= last:
            return
