"""Turn conversations into token shards with loss masks: chat template, filters, validation sets, packing.

Records have `conversations` or `messages`: a list of {role, content} or ShareGPT's {from, value}, with tool calls,
reasoning, tools and documents as the template reads them. Loss marks (weight, train, train_detail, loss, ...) are used.
A field with content that the template does not read is refused; other unread fields are counted by name. The template
is the tokenizer's own or --template. The template itself determines the assistant's content; the loss covers it and the
tokens that end its turn. Output: PREFIX_chat_document, PREFIX_held_out_VALUE_chat_document, each with a mask. The same
command again keeps what is whole; after a change it is refused.

Conditions of --where (all must be true) and --drop (all must be false): lang=eu, lang!=eu, score>=3, id^=translation_
(starts with), id~=REGEX. Bad conversations (two user turns in a row, an empty answer, an unknown role) are named;
--on-bad skip counts them and keeps them in PREFIX.rejects.jsonl.

Example: megatron-cpt data prepare-chat --input chat/*.jsonl --tokenizer models/base --template llama3 \\
  --output-prefix tokens/chat --drop 'conversation_id^=translation_' --dedup-prompts --held-out 1000 --held-out-by lang \\
  --pack 8192 --workers 16
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

from megatron_cpt.verbs.tokenize import parse_count_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = parse_count_argument
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or (quoted) globs of records")
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="take only files that match")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out files that match")
    parser.add_argument("--format", choices=("jsonl", "json", "txt", "parquet", "arrow"), help="whatever the names say")
    parser.add_argument("--max-document-bytes", type=count, default=256 << 20, help="longest line (default: 256 MiB)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder or tokenizer.json")
    parser.add_argument("--eod-token", help="end-of-document token, where the tokenizer's eos_token is not the one")
    parser.add_argument("--output-prefix", type=Path, required=True, help="prefix without _chat_document")
    parser.add_argument(
        "--keys",
        nargs="+",
        default=["conversations", "messages"],
        help="fields with the turns; the first that is there",
    )
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of turns and fields of records to leave out: reasoning_content",
    )
    parser.add_argument("--text-key", help="field of completion data, learned whole, in records without turns")
    template = parser.add_argument_group("template")
    template.add_argument(
        "--template",
        type=Path,
        metavar="FILE.jinja",
        help="chat template, or chatml or llama3 (default: the tokenizer's)",
    )
    template.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the template: enable_thinking=false",
    )
    template.add_argument(
        "--date",
        type=datetime.date.fromisoformat,
        help="what a template that asks is told (default: today), 2026-11-21",
    )
    template.add_argument(
        "--train-on",
        choices=("assistant", "last", "all"),
        default="assistant",
        help="learn every answer (default), the last answer only, or all tokens",
    )
    template.add_argument(
        "--unroll",
        action="store_true",
        help="make a document of each answer, with the conversation before it: for templates that rewrite earlier turns",
    )
    template.add_argument(
        "--train-on-eos",
        choices=("turn", "last", "none"),
        default="turn",
        help="learn the end of each assistant turn (default), of the last one only, or of none",
    )
    choice = parser.add_argument_group("choice of conversations")
    choice.add_argument("--where", action="append", default=[], metavar="CONDITION", help="all must hold")
    choice.add_argument("--drop", action="append", default=[], metavar="CONDITION", help="none may hold")
    choice.add_argument("--dedup-prompts", action="store_true", help="keep the first of those with one first user turn")
    choice.add_argument("--number", type=count, help="draw so many for training at random (default: all)")
    choice.add_argument("--held-out", type=count, default=0, metavar="N", help="hold out N as a validation set")
    choice.add_argument("--held-out-by", metavar="FIELD", help="N for each value of this field: lang")
    choice.add_argument(
        "--held-out-from",
        type=Path,
        metavar="FILE",
        help="PREFIX.held_out.json of an earlier run: nothing changes sides",
    )
    choice.add_argument("--seed", type=int, default=42, help="of --number and the order of packs (default: 42)")
    choice.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="bad conversations (default: fail)")
    choice.add_argument(
        "--on-empty-answer",
        choices=("reject", "learn", "mask"),
        default="reject",
        help="an empty answer makes a conversation bad (default), is learned, or is left out of the loss",
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-length", type=count, help="longest conversation in tokens (default: that of --pack, or any)"
    )
    length.add_argument(
        "--on-long",
        choices=("truncate", "drop", "fail"),
        default="truncate",
        help="cut after the last assistant turn that fits (default; where none does it is left out), leave out, or fail",
    )
    length.add_argument("--pack", type=count, metavar="SEQ_LENGTH", help="pack into sequences of so many tokens")
    length.add_argument("--max-packs", type=count, help="keep so many packs of training, chosen at random: 7.5M")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")


def run(arguments: argparse.Namespace) -> None:
    # numpy and the tokenizer libraries are slow to import; --help must not wait for them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megatron_cpt.data.chat.driver import Choice, prepare_chat, report_text
    from megatron_cpt.data.chat.encode import ChatJob
    from megatron_cpt.data.chat.writing import chat_rejects_path
    from megatron_cpt.data.joining.packing import PackOptions
    from megatron_cpt.data.reading.conversations import ChatLayout
    from megatron_cpt.data.reading.documents import list_sources
    from megatron_cpt.errors import ConfigError

    if arguments.max_packs is not None and arguments.pack is None:
        raise ConfigError("--max-packs: counts packs, but none are made. Give --pack SEQ_LENGTH as well.")
    job = ChatJob(
        tokenizer_path=arguments.tokenizer,
        layout=ChatLayout(
            message_keys=tuple(arguments.keys),
            text_key=arguments.text_key,
            max_document_bytes=arguments.max_document_bytes,
            on_empty_answer=arguments.on_empty_answer,
            ignored_keys=tuple(arguments.ignore_keys),
        ),
        eod_token=arguments.eod_token,
        template_path=arguments.template,
        template_variables=tuple(map(_variable, arguments.set)),
        date=arguments.date,
        where=tuple(arguments.where),
        drop=tuple(arguments.drop),
        seed=arguments.seed,
        held_out_by=arguments.held_out_by,
        train_on=arguments.train_on,
        unroll=arguments.unroll,
        train_on_eos=arguments.train_on_eos,
        max_length=arguments.max_length,
        on_long=arguments.on_long,
    )
    pack = None
    if arguments.pack is not None:
        pack = PackOptions(seq_length=arguments.pack, max_packs=arguments.max_packs, seed=arguments.seed)
    manifests = prepare_chat(
        list_sources(
            arguments.input,
            arguments.include,
            arguments.exclude,
            arguments.format,
            keep_bad_files=arguments.on_bad == "skip",
        ),
        arguments.output_prefix,
        job,
        Choice(
            dedup_prompts=arguments.dedup_prompts,
            number=arguments.number,
            held_out=arguments.held_out,
            bounds_path=arguments.held_out_from,
        ),
        pack=pack,
        on_bad=arguments.on_bad,
        workers=max(arguments.workers, 1),
    )
    sys.stdout.write(report_text(manifests))
    if next(iter(manifests.values()))["rejects"]:
        sys.stdout.write(f"bad conversations are in {chat_rejects_path(arguments.output_prefix)}\n")


def _variable(text: str) -> tuple[str, object]:
    """Return name and value of NAME=VALUE; true, false and integers are parsed."""
    from megatron_cpt.errors import ConfigError

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set {text}: not NAME=VALUE. A variable of the template is needed.")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.lstrip("-").isdecimal() else value
