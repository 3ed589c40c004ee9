"""Which models of transformers train in 4 bits, are exported, load again, and compute the same.

    python benchmarks/model_families.py                           # results/model_families.csv and docs/models.md
    python benchmarks/model_families.py --only LlamaForCausalLM BertForMaskedLM --dry-run

Every class for causal and masked language modelling of the installed transformers is made from a tiny random
configuration, converted (INT4 weights in groups of 32), trained for two steps in bfloat16, exported, and loaded with
plain `from_pretrained`; its logits must be those of the trained model, to the bit. What no tiny configuration was found
for, or does not train like this without 4 bits either, is listed as not tried.
"""

from __future__ import annotations

import argparse
import copy
import csv
import inspect
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, export_4bit, restore_linear
from hf_stablespam.quant.layers.experts import FourBitExperts

CSV = Path(__file__).parent / "results" / "model_families.csv"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- written by benchmarks/model_families.py -->"
CONFIG = FourBitConfig("int4", None, group_size=32)
LARGEST = 4_000_000  # parameters of a tiny model
PLAIN, DEQUANTIZED, NO_LAYER, NOT_TRIED = "equal", "equal with dequantize=True", "no layer to convert", "not tried"
IN_FLOAT32 = "loads in float32"
# What was found in transformers.
REASONS = {
    "FalconMambaForCausalLM": "transformers computes dt_proj of a quantized model in another order of operations",
}
# In this order, until one goes through.
WAYS_TO_LOAD: dict[str, Callable[[], dict[str, Any]]] = {
    PLAIN: lambda: {"dtype": torch.bfloat16},
    DEQUANTIZED: lambda: {
        "dtype": torch.bfloat16,
        "quantization_config": transformers.CompressedTensorsConfig(dequantize=True),
    },
    IN_FLOAT32: lambda: {"dtype": torch.float32},
}
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))

# What families call the sizes of a model.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "context_length"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "state_size", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "rotary_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4, "n_layer": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 32, "expand": 2},
)

# What some classes need beside the sizes that all share.
NEEDED: dict[str, dict[str, Any]] = {
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "BeamForCausalLM": {"mlp_layer_types": ["dense", "sparse"]},
    "FlintForCausalLM": {"mlp_only_layers": []},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "KimiLinearForCausalLM": {"linear_head_dim": 16, "linear_num_heads": 4, "num_local_experts": 4},
    "Gemma4ForCausalLM": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 16,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "num_kv_shared_layers": 0,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


class Result(NamedTuple):
    """A row of the table."""

    model: str
    task: str
    outcome: str
    four_bit: int  # layers and blocks of experts
    remark: str = ""


def classes() -> Iterator[tuple[str, str]]:
    """Names and tasks of the classes."""
    mappings = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    for task, names in mappings.items():
        flat = (name[0] if isinstance(name, list | tuple) else name for name in names.values())
        yield from ((name, task) for name in dict.fromkeys(flat))


def try_family(name: str, task: str) -> Result:
    """Convert, train, export, load and compare a tiny model of a class."""
    model, remark = _trainable(name, task)
    if model is None:
        return Result(name, task, NOT_TRIED, 0, remark)
    try:
        convert_to_4bit(model, CONFIG)
    except ValueError:
        return Result(name, task, NO_LAYER, 0)
    count = sum(isinstance(module, FourBitLinear | FourBitExperts) for module in model.modules())
    try:
        _train(model)
        result = Result(name, task, *_exported(model.eval(), count))
    except Exception as error:
        result = Result(name, task, "fails", count, _brief(error))
    if result.outcome in ("differs", "fails"):
        remark = f"{result.remark}; without 4 bits {_baseline(restore_linear(model))}"
        return result._replace(remark=f"{remark}; {REASONS[name]}" if name in REASONS else remark)
    return result


def _exported(model: Any, count: int) -> tuple[str, int, str]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_4bit(model, folder, leave_unpackable=True)
        problem = ""
        for outcome, how in WAYS_TO_LOAD.items():
            reference = copy.deepcopy(model).float() if outcome == IN_FLOAT32 else model
            try:
                loaded = type(model).from_pretrained(folder, **how()).eval()
                problem = _with_buffers_of(loaded, reference) or problem
                distance = float((loaded(input_ids=IDS).logits - reference(input_ids=IDS).logits).abs().max())
            except (AttributeError, RuntimeError) as error:
                problem = problem or _brief(error)
                continue
            if distance == 0 or (outcome == IN_FLOAT32 and distance < 1e-4):  # the scales were rounded for bfloat16
                return outcome, count, problem
            return "differs", count, f"logits by {distance:.1e}"
    return "fails", count, problem


def _with_buffers_of(loaded: nn.Module, model: nn.Module) -> str:
    """Give a loaded model the unstored buffers of another; what to remark where they had another dtype.

    transformers makes them anew, in a dtype that depends on how a model is loaded.
    """
    saved = loaded.state_dict().keys()
    own = dict(model.named_buffers())
    remark = ""
    for name, buffer in loaded.named_buffers():
        if name not in saved and name in own and buffer.is_floating_point():
            if own[name].dtype != buffer.dtype:
                dtypes = f"{own[name].dtype} and not {buffer.dtype}".replace("torch.", "")
                remark = f"with {name.split('.')[-1]}, which is not stored, in {dtypes}"
            buffer.data = own[name].data.clone()
    return remark


def _baseline(model: Any) -> str:
    """What becomes of the logits when the model is saved and loaded again without 4 bits."""
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
            distance = float((loaded(input_ids=IDS).logits - model.eval()(input_ids=IDS).logits).abs().max())
    except Exception as error:
        return _brief(error)
    return f"by {distance:.1e}"


def _trainable(name: str, task: str) -> tuple[Any, str]:
    """A tiny bfloat16 model of the class that trains without 4 bits, or why there is none."""
    remark = ""
    for overrides in ATTEMPTS:
        for whole in (False, True):  # buffers as well: no loaded model has them so, but some families need it
            try:
                model = _tiny(getattr(transformers, name), task, {**overrides, **NEEDED.get(name, {})})
                if whole:
                    model = model.bfloat16()
                kept = model._get_dtype_plan(torch.bfloat16)  # in float32, in a model that was loaded too
                for key, parameter in model.named_parameters():
                    if not any(re.search(pattern.replace("*", ".*"), key) for pattern in kept):
                        parameter.data = parameter.data.bfloat16()
                model(input_ids=IDS, labels=IDS).loss.backward()
                model.zero_grad()
            except Exception as error:
                remark = remark or _brief(error)
            else:
                return model, ""
    return None, remark


def _tiny(model_class: Any, task: str, overrides: dict[str, Any]) -> Any:
    config_class = model_class.config_class
    known: set[str] = set()
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
        if "__init__" in base.__dict__:
            known |= set(inspect.signature(base.__init__).parameters)
    config = config_class(**{key: value for key, value in {**SMALL, **overrides}.items() if key in known})
    config.use_cache = False
    if task == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:.1e} parameters at the smallest sizes known here")
    torch.manual_seed(0)
    return model_class(config).train()


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"


def page(rows: list[dict[str, str]]) -> str:
    """The part of the page that is written here."""
    of = {outcome: [row for row in rows if row["outcome"] == outcome] for outcome in {row["outcome"] for row in rows}}
    tried = [row for row in rows if row["outcome"] != NOT_TRIED]
    lines = [
        f"Of {len(rows)} classes {len(tried)} were tried, with transformers {rows[0]['transformers']}:"
        f" {len(of.get(PLAIN, []))} load plainly with equal logits.",
        "",
        "| model | 4-bit layers | exported, loaded, logits | remark |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{row['model']}` | {row['four_bit']} | {row['outcome']} | {_cell(row['remark'])} |" for row in tried]
    names = ", ".join(f"`{row['model']}`" for row in of.get(NOT_TRIED, []))
    return "\n".join([*lines, "", f"Not tried: {names or 'none'}.", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these classes; the rows of the others stay")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    rows = []
    for name, task in classes():
        if arguments.only and name not in arguments.only:
            continue
        result = try_family(name, task)
        print(*result, sep="  ", flush=True)
        rows.append({**{key: str(value) for key, value in result._asdict().items()}, **versions})
    if arguments.dry_run:
        return
    if arguments.only:  # in the place of their former rows
        anew = {(row["model"], row["task"]): row for row in rows}
        with CSV.open(newline="") as file:
            rows = [anew.get((row["model"], row["task"]), row) for row in csv.DictReader(file)]
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PAGE.write_text(PAGE.read_text().split(BEGIN)[0] + BEGIN + "\n\n" + page(rows))


if __name__ == "__main__":
    main()
