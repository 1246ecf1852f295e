"""Measure `megatron-cpt tokenize` against public tools on corpora that every machine can make.

Corpora: English and code from the Python installation and its packages (and /usr/share/doc), synthetic Chinese and
Japanese; as they are, as many small documents, and as few large ones. Tokenizers are trained here: a byte-level BPE with
Llama 3's split pattern, a SentencePiece BPE with Llama 2's settings, and a unigram model. Tools: ours; a loop over
megatron-core's IndexedDatasetBuilder with the library's own batch call (what the usual preprocessing tool does);
datatrove's MegatronDocumentTokenizer, where --datatrove-python has it; and the pure encode rate of our engine on texts in
memory, the ceiling. Seconds are wall clock and processor time (which a busy machine disturbs less), memory is the peak of
the summed PSS of all processes of a tool, from a run of its own. Times are the median of --runs.

Example: python benchmarks/tokenizing.py --work /tmp/bench --megabytes 400 --runs 3 --workers 2
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WORK = Path(tempfile.gettempdir()) / "megatron-cpt-tokenizing"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENGINE_OF = {"bpe": "fastokens", "sp_bpe": "gigatoken", "sp_unigram": "reference"}
LOOP = """
import json, os, sys
path, tokenizer, output, workers = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = workers
import torch, numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
if tokenizer.endswith(".model"):
    import sentencepiece
    backend = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    encode, eod = lambda texts: backend.encode(texts, num_threads=int(workers)), backend.eos_id()
else:
    from tokenizers import Tokenizer
    backend = Tokenizer.from_file(tokenizer + "/tokenizer.json")
    encode = lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]
    eod = backend.token_to_id("<|end_of_text|>")
builder = IndexedDatasetBuilder(output + ".bin", dtype=numpy.uint16)
def flush(texts):
    for ids in encode(texts):
        builder.add_document(torch.tensor([*ids, eod]), [len(ids) + 1])
texts, size = [], 0
for line in open(path, encoding="utf-8"):
    texts.append(json.loads(line)["text"])
    size += len(texts[-1])
    if len(texts) >= 1000 or size > 16_000_000:
        flush(texts)
        texts, size = [], 0
flush(texts)
builder.finalize(output + ".idx")
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
folder, tokenizer, output, workers = sys.argv[1:]
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer + "/tokenizer.json",
                                      eos_token="<|end_of_text|>", batch_size=1000),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=output + "/logs",
    ).run()
"""
CEILING = """
import json, multiprocessing, os, sys, time
from pathlib import Path
path, tokenizer, workers, engine = sys.argv[1:]
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from megatron_cpt.data.tokenizer.threads import ONE_THREAD
os.environ.update(ONE_THREAD)
from megatron_cpt.data.tokenizer.encoders import load_engine
from megatron_cpt.data.tokenizer.interface import load_tokenizer
def work(rank, texts, barrier, queue):
    loaded = load_engine(load_tokenizer(Path(tokenizer)), engine)
    barrier.wait()
    start, processor = time.monotonic(), time.process_time()
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 8 << 20:
            loaded.encode(batch)
            batch, size = [], 0
    loaded.encode(batch)
    queue.put((time.monotonic() - start, time.process_time() - processor))
texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
context = multiprocessing.get_context("fork")
barrier, queue = context.Barrier(int(workers)), context.Queue()
shares = [texts[rank :: int(workers)] for rank in range(int(workers))]
processes = [context.Process(target=work, args=(r, s, barrier, queue)) for r, s in enumerate(shares)]
for process in processes: process.start()
times = [queue.get() for _ in processes]
print(json.dumps({"wall": max(t[0] for t in times), "processor": sum(t[1] for t in times)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for corpora, tokenizers and outputs")
    parser.add_argument("--megabytes", type=int, default=400, help="size of the mixed corpus")
    parser.add_argument("--cjk-share", type=float, default=0.3, help="share of Chinese and Japanese in its bytes (0.3)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--corpora", nargs="+", default=["mixed", "small", "large"])
    parser.add_argument("--tokenizers", nargs="+", default=["bpe", "sp_bpe", "sp_unigram"])
    parser.add_argument("--tools", nargs="+", default=["ours", "ceiling", "loop"], help="also: datatrove, reference")
    parser.add_argument("--datatrove-python", type=Path, help="a Python that has datatrove[processing]")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = arguments.work / f"corpora-{arguments.megabytes}-{arguments.cjk_share:g}"
    corpora = build_corpora(folder, arguments.megabytes, arguments.cjk_share)
    tokenizers = train_tokenizers(folder / "tokenizers", corpora["mixed"])
    print("| corpus | tokenizer | tool | wall s | processor s | peak MB | MB/s |\n|---|---|---|---|---|---|---|")
    for corpus in arguments.corpora:
        for tokenizer in arguments.tokenizers:
            for tool in arguments.tools:
                of = (tool, corpora[corpus], tokenizers[tokenizer], arguments)
                _, _, peak = measure(*of, with_memory=True)
                runs = [measure(*of, with_memory=False) for _ in range(arguments.runs)]
                wall, processor, _ = (statistics.median(values) for values in zip(*runs, strict=True))
                rate = text_bytes(corpora[corpus]) / 1e6 / wall
                cells = (corpus, tokenizer, tool, f"{wall:.1f}", f"{processor:.1f}", f"{peak:.0f}", f"{rate:.1f}")
                print("| " + " | ".join(cells) + " |", flush=True)
            if {"ours", "loop"} <= set(arguments.tools):
                compare(arguments.work / "out")


def measure(
    tool: str, corpus: Path, tokenizer: Path, arguments: argparse.Namespace, *, with_memory: bool
) -> tuple[float, float, float]:
    """Run a tool once; return wall seconds, processor seconds of all its processes, and peak megabytes.

    Reading the memory of its processes slows a tool down, so that the times of a run with memory say little.
    """
    output = arguments.work / "out" / tool
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    workers = str(arguments.workers)
    parts = split_corpus(corpus, arguments.workers) if tool == "datatrove" else None
    python = sys.executable
    ours = [python, "-m", "megatron_cpt", "tokenize", "--input", corpus, "--tokenizer", tokenizer]
    ours += ["--workers", workers, "--output-prefix", output / "x"]
    command = {
        "ours": ours,
        "reference": [*ours, "--engine", "reference"],
        "loop": [python, "-c", LOOP, corpus, tokenizer, output / "x_text_document", workers],
        "datatrove": [arguments.datatrove_python, "-c", DATATROVE, parts, tokenizer, output, workers],
        "ceiling": [
            python,
            "-c",
            CEILING,
            corpus,
            tokenizer,
            workers,
            ENGINE_OF[tokenizer.stem],
        ],
    }[tool]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = PeakMemory(process.pid) if with_memory else None
    stdout, stderr = process.communicate()
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_megabytes = peak.stop() if peak else 0.0
    if process.returncode:
        sys.exit(f"{tool} failed:\n{stderr[-3000:]}")
    if tool == "ceiling":
        times = json.loads(stdout.splitlines()[-1])
        return times["wall"], times["processor"], peak_megabytes
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak_megabytes


class PeakMemory:
    """Samples the PSS of a process and its descendants until stopped."""

    def __init__(self, pid: int):
        self.pid, self.peak = pid, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> float:
        """Return peak megabytes."""
        self._done.set()
        self._thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self._done.wait(0.2):
            total = 0.0
            for pid in descendants(self.pid):
                try:
                    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
            self.peak = max(self.peak, total / 1000)


def descendants(pid: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from descendants(int(child))
    except OSError:
        return


def compare(output: Path) -> None:
    """Stop unless ours and the loop wrote the same bytes."""
    for suffix in (".bin", ".idx"):
        ours, loop = ((output / tool / f"x_text_document{suffix}").read_bytes() for tool in ("ours", "loop"))
        if ours != loop:
            sys.exit(f"ours and the loop differ in {suffix}")


def split_corpus(corpus: Path, workers: int) -> Path:
    """Return a folder with the corpus in one file per worker, which is how datatrove divides its work."""
    folder = corpus.parent / f"parts-{workers}"
    if not folder.exists():
        folder.mkdir()
        lines = corpus.read_bytes().splitlines(keepends=True)
        for rank in range(workers):
            (folder / f"{rank}.jsonl").write_bytes(b"".join(lines[rank::workers]))
    return folder


def text_bytes(corpus: Path) -> int:
    return int((corpus.parent / "text_bytes").read_text())


def build_corpora(folder: Path, megabytes: int, cjk_share: float) -> dict[str, Path]:
    """Write the three corpora unless they are there; return their files."""
    paths = {name: folder / name / "documents.jsonl" for name in ("mixed", "small", "large")}
    if all((path.parent / "text_bytes").exists() for path in paths.values()):
        return paths
    texts = []
    size = 0
    cjk_bytes = round(megabytes * 1e6 * cjk_share)
    for text in [*natural_texts(megabytes * 1_000_000 - cjk_bytes), *cjk_texts(cjk_bytes)]:
        texts.append(text)
        size += len(text.encode())
    random.Random(2).shuffle(texts)
    quarter = texts[: len(texts) // 4]
    small = [text[i : i + 300] for text in quarter for i in range(0, len(text), 300)]
    joined = "\n\n".join(quarter)
    large = [joined[i : i + 8_000_000] for i in range(0, len(joined), 8_000_000)]
    for name, documents in (("mixed", texts), ("small", small), ("large", large)):
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        with paths[name].open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (paths[name].parent / "text_bytes").write_text(str(sum(len(text.encode()) for text in documents)))
    return paths


def natural_texts(limit_bytes: int) -> list[str]:
    """Return code and prose that the Python installation brings."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")] + [Path("/usr/share/doc")]
    texts, size, seen = [], 0, set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in (".py", ".md", ".rst", ".txt", ".h", ".pyi") or not path.is_file():
                continue
            if path.stat().st_size > 1_000_000 or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) > 60:
                texts.append(text)
                size += len(text)
                if size > limit_bytes:
                    return texts
    return texts


def cjk_texts(limit_bytes: int) -> list[str]:
    """Return synthetic Chinese and Japanese: words of a fixed lexicon, drawn by rank."""
    chooser = random.Random(1)
    han = [chr(0x4E00 + i * 7) for i in range(2500)]
    kana = [chr(code) for code in range(0x3041, 0x3094)]
    lexicon = ["".join(chooser.choices(han, k=chooser.randint(1, 3))) for _ in range(20000)]
    lexicon += ["".join(chooser.choices(kana, k=chooser.randint(1, 4))) for _ in range(5000)]
    chooser.shuffle(lexicon)
    weights = [1 / (rank + 10) for rank in range(len(lexicon))]
    texts, size = [], 0
    while size < limit_bytes:
        words = chooser.choices(lexicon, weights, k=chooser.randint(30, 3000))
        sentences = ["".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        texts.append("。".join(sentences) + "。")
        size += 3 * len(texts[-1])
    return texts


def train_tokenizers(folder: Path, corpus: Path) -> dict[str, Path]:
    """Train the three tokenizers on a sample unless they are there; return their paths."""
    paths = {"bpe": folder / "bpe", "sp_bpe": folder / "sp_bpe.model", "sp_unigram": folder / "sp_unigram.model"}
    if all(path.exists() for path in paths.values()):
        return paths
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    sample = []
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            sample.append(json.loads(line)["text"][:20000])
            if sum(map(len, sample[-100:])) == 0 or len(sample) >= 2500:
                break
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    paths["bpe"].mkdir(exist_ok=True)
    tokenizer.save(str(paths["bpe"] / "tokenizer.json"))
    (paths["bpe"] / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line[:4000] for text in sample[:1500] for line in text.split("\n") if line.strip()),
            model_prefix=str(folder / f"sp_{kind}"),
            model_type=kind,
            vocab_size=32000 if kind == "bpe" else 16000,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return paths


if __name__ == "__main__":
    main()
