"""The texts of a source that are documents of a shard, reconstructed from its manifest for audit and trace.

A text without a token of its own is no document, under any key; a document that spells a control token is none where the
shard rejects it. Shards of release 0.1 kept texts without tokens as lone end-of-document tokens.
"""

from typing import Any

from megatron_cpt.data.reading.records import Parsed
from megatron_cpt.data.shards.indexed import shard_options
from megatron_cpt.data.tokenizer.control_tokens import ControlTokens
from megatron_cpt.data.tokenizer.interface import Tokenizer


class DocumentRules:
    """The rules of one shard; without a tokenizer they hold where no text has to be looked into."""

    def __init__(self, manifest: dict[str, Any], tokenizer: Tokenizer | None):
        options = shard_options(manifest)
        self.key = options["keys"].index(manifest["key"]) if "keys" in options else 0  # an adopted shard has no sources
        self.are_stated = "special_tokens" in manifest["options"]
        """Whether the manifest counts what the rules leave out."""
        self.control = ControlTokens(tokenizer.control_tokens() if tokenizer else ())
        self.rejects_control = options.get("special_tokens") == "reject"
        self.tokenizer = tokenizer
        self.num_left_out = 0
        """Texts of the last piece that are not empty and have no token."""

    def needs_tokenizer(self, entry: dict[str, Any]) -> bool:
        """Return whether the documents of a source cannot be told without the tokenizer."""
        return self.are_stated and (self.rejects_control or bool(entry.get("without_tokens")))

    def documents(self, parsed: Parsed, entry: dict[str, Any]) -> tuple[list[str], list[int]]:
        """Return the texts of a piece that are documents, and their lines; rejected texts are added to the piece's
        problems."""
        self.num_left_out = 0
        if self.rejects_control:
            self.control.reject(parsed)
        texts, lines = parsed.texts[self.key], parsed.lines
        if not self.are_stated:
            return texts, lines
        has_tokens = [bool(text) for text in texts]
        if entry.get("without_tokens") and self.tokenizer is not None:
            has_tokens = [bool(ids) for ids in self.tokenizer.encode_batch(texts)]
            self.num_left_out = sum(bool(text) and not kept for text, kept in zip(texts, has_tokens, strict=True))
        if all(has_tokens):
            return texts, lines
        kept = [number for number, is_kept in enumerate(has_tokens) if is_kept]
        return [texts[number] for number in kept], [lines[number] for number in kept]
