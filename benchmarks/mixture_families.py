"""Which mixtures of transformers train in 4 bits, and in which form each comes out.

    python benchmarks/mixture_families.py                      # results/mixture_families.csv and docs/mixtures.md
    python benchmarks/mixture_families.py --only MixtralForCausalLM --dry-run

A tiny random model of each class (as in model_families.py) is converted (INT4 weights in groups of 32), trained for
two steps, exported, loaded and compared; `packed` experts are those of which the file holds codes. GGUF: whether the
class is written directly, after the checks that come before training; else what the refusal begins with.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from safetensors import safe_open

from benchmarks import model_families as families
from hf_stablespam import convert_to_4bit, export_4bit, export_gguf
from hf_stablespam.quant.export.gguf.architectures import ARCHITECTURES
from hf_stablespam.quant.layers.experts import FourBitExperts

CSV = Path(__file__).parent / "results" / "mixture_families.csv"
PAGE = Path(__file__).parents[1] / "docs" / "mixtures.md"
BEGIN, END = "<!-- written by benchmarks/mixture_families.py -->", "<!-- until here -->"
NAMES = (
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Qwen3Next",
    "Qwen3_5Moe",
    "Qwen4Exp",
    "DeepseekV2",
    "DeepseekV3",
    "DeepseekV32",
    "DeepseekV4",
    "GptOss",
    "Olmoe",
    "FlexOlmo",
    "GraniteMoe",
    "GraniteMoeHybrid",
    "GraniteMoeShared",
    "GraniteMoeSWA",
    "Glm4Moe",
    "Glm4MoeLite",
    "GlmMoeDsa",
    "KimiLinear",
    "Ernie4_5_Moe",
    "MiniMax",
    "MiniMaxM2",
    "HunYuanMoEV1",
    "HYV3",
    "HYV4",
    "NemotronH",
    "Jamba",
    "Lfm2Moe",
    "Dots1",
    "Dots3Note",
    "Phimoe",
    "Gemma4",
    "Cohere2Moe",
    "ExaoneMoe",
    "SolarOpen",
    "Afmoe",
    "AXK1",
    "AXK2",
    "BailingHybrid",
    "Beam",
    "Flint",
    "Kolibri1",
    "Laguna",
    "LaraMini",
    "Mellum",
    "MiMoV2Flash",
    "Zaya",
    "Llama4",
    "JetMoe",
    "Dbrx",
)


def try_mixture(name: str) -> dict[str, Any]:
    """A row of the table."""
    row = {"model": name, "experts": "", "export_4bit": "", "gguf": ""}
    # Experts from the second layer on, and for Qwen3-MoE what its pretrained models have.
    families.SMALL.update(first_k_dense_replace=1, norm_topk_prob=name.startswith("Qwen3Moe"))
    model, remark = families._trainable(name, "causal")
    if model is None:
        return {**row, "experts": f"not tried: {remark}"}
    convert_to_4bit(model, families.CONFIG)
    blocks = sum(isinstance(module, FourBitExperts) for module in model.modules())
    row["experts"] = "4 bits" if blocks else "high precision"
    try:
        families._train(model)
        outcome, _, note = families._exported(model.eval(), blocks)
        row["export_4bit"] = f"{form(model)}, {outcome}{f' ({note})' if note else ''}"
    except Exception as error:
        row["export_4bit"] = families._brief(error)
    try:
        with tempfile.TemporaryDirectory() as folder:
            export_gguf(model, Path(folder, "model.gguf"))
        row["gguf"] = "written"
    except ValueError as error:
        row["gguf"] = "by repack" if name not in ARCHITECTURES else f"refused: {families._brief(error)}"
    return row


def form(model: Any) -> str:
    """In which form the experts are in a packed checkpoint."""
    if not any(isinstance(module, FourBitExperts) for module in model.modules()):
        return "as they are"
    names: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        export_4bit(model, folder, leave_unpackable=True)
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names += tensors.keys()
    packed = [name for name in names if ".experts." in name and name.endswith(("weight_packed", "_blocks"))]
    return "packed" if packed else "rounded"


def table(rows: list[dict[str, Any]]) -> str:
    """The part of the page that is written here."""
    lines = ["| class | experts in training | `export_4bit`: experts, logits | GGUF |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(map(families._cell, row.values())) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these classes")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for name in arguments.only or [f"{name}ForCausalLM" for name in NAMES]:
        rows.append(try_mixture(name))
        print(*rows[-1].values(), sep="  ", flush=True)
    if arguments.dry_run or arguments.only:
        return
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "transformers", "torch"], lineterminator="\n")
        writer.writeheader()
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        writer.writerows({**row, **versions} for row in rows)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
