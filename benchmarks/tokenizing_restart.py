"""Kill `megatron-cpt tokenize` in the middle of a corpus of mixed formats, run it again, audit, and compare the bytes.

The corpus (plain, .gz, .zst and .xz JSON lines, text, Parquet, Arrow) is made of what `tokenizing.py` beside this file
collects. The run is killed with signal 9 after each given share of its shards, then run to its end; its files must equal
an undisturbed run's byte for byte, and `data audit` must pass.

Example: python benchmarks/tokenizing_restart.py --work /tmp/bench --megabytes 1000
"""

import argparse
import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

FILES = 28
KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "jsonl.xz", "txt", "parquet", "arrow")


def main() -> None:
    from tokenizing import WORK, build_corpora, train_tokenizers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for corpora, tokenizers and outputs")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-after", type=float, nargs="+", default=[0.3, 0.6], help="shares of the shards")
    arguments = parser.parse_args()
    corpora = build_corpora(arguments.work / "corpora", min(arguments.megabytes, 400), 0.3)
    tokenizer = train_tokenizers(arguments.work / "tokenizers", corpora["mixed"])["bpe"]
    folder = arguments.work / f"restart-{arguments.megabytes}"
    size = build_mixed(folder / "in", corpora["mixed"], arguments.megabytes * 1_000_000)
    print(f"{FILES} files, {size / 1e6:,.0f} MB of text, {directory_bytes(folder / 'in') / 1e6:,.0f} MB on disk")

    for name in ("killed", "whole"):
        shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "megatron_cpt", "tokenize", "--input", folder / "in", "--tokenizer", tokenizer]
    command += ["--workers", arguments.workers, "--provenance", "--output-dir"]
    for share in arguments.kill_after:
        process = start([*command, folder / "killed"])
        while process.poll() is None and finished(folder / "killed") < share * FILES:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed with {finished(folder / 'killed')} of {FILES} shards whole")
    began = time.monotonic()
    assert start([*command, folder / "killed"]).wait() == 0
    print(f"rerun to the end: {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    assert start([*command, folder / "whole"]).wait() == 0
    print(f"undisturbed run: {time.monotonic() - began:.1f} s")
    audit = [
        sys.executable,
        "-m",
        "megatron_cpt",
        "data",
        "audit",
        "--input",
        folder / "killed",
        "--tokenizer",
        tokenizer,
    ]
    assert start(audit).wait() == 0
    killed, whole = content(folder / "killed"), content(folder / "whole")
    assert killed.keys() == whole.keys(), killed.keys() ^ whole.keys()
    assert all(killed[name] == whole[name] for name in whole)
    print(f"identical: {len(whole)} files, {sum(map(len, whole.values())) / 1e6:,.0f} MB")


def start(command: list[object]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen([str(part) for part in command], env=environment)


def finished(folder: Path) -> int:
    return sum(not path.name.startswith(".") for path in folder.glob("*.json"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def directory_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def build_mixed(folder: Path, corpus: Path, total_bytes: int) -> int:
    """Write files of all kinds unless they are there; return the bytes of their text."""
    done = folder.with_name("text_bytes")
    if done.exists():
        return int(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts, size, written = [], 0, 0
    number = 0
    while number < FILES:
        with corpus.open(encoding="utf-8") as file:
            for line in file:
                texts.append(json.loads(line)["text"])
                size += len(texts[-1].encode())
                if size >= total_bytes / FILES:
                    write(folder / f"{number:02d}.{KINDS[number % len(KINDS)]}", texts)
                    number, written = number + 1, written + size
                    texts, size = [], 0
                    if number == FILES:
                        break
    done.write_text(str(written))
    return written


def write(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif kind == "arrow":
        table = pa.table({"text": texts})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    elif kind == "txt":
        path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")
    else:
        data = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
        compress = {
            "jsonl": bytes,
            "jsonl.gz": lambda data: gzip.compress(data, 3),
            "jsonl.zst": zstandard.ZstdCompressor().compress,
            "jsonl.xz": lambda data: lzma.compress(data, preset=0),
        }[kind]
        path.write_bytes(compress(data))


if __name__ == "__main__":
    main()
