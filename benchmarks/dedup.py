"""Measure near-duplicate removal on made-up documents of 50 to 500 words, one in twenty a copy.

Example: python benchmarks/dedup.py --documents 40000 --workers 1
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate, report_table
from megatron_cpt.data.reading.named_corpora import named_corpora
from megatron_cpt.data.reading.record_files import Reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        files = write_documents(Path(folder), arguments.documents, arguments.workers)
        size = sum(path.stat().st_size for path in files) / 1e6
        wall, cpu = time.perf_counter(), time.process_time()
        corpora = named_corpora([f"c={path}" for path in files])
        report = deduplicate(corpora, Path(folder) / "out", Reading(), DedupOptions(), workers=arguments.workers)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        sys.stdout.write(report_table(report))
        sys.stdout.write(
            f"{size:.0f} MB in {wall:.1f} s ({cpu:.1f} s of this process), {size / wall:.1f} MB/s, {peak} MB\n"
        )


def write_documents(folder: Path, number: int, files: int) -> list[Path]:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20000)]
    documents = [" ".join(rng.choices(vocabulary, k=rng.randint(50, 500))) for _ in range(number)]
    documents += documents[: number // 20]
    paths = [folder / f"{index}.jsonl" for index in range(files)]
    for index, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[index::files]))
    return paths


if __name__ == "__main__":
    main()
