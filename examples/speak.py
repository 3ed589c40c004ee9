"""Teach a small Llama to speak, and let it try again where listeners are not content: Llasa in minutes on a CPU.

    python examples/speak.py --output_dir runs/speak
    python examples/speak.py --output_dir runs/speak --four_bit int4
    python examples/speak.py --output_dir runs/speak --released --text "Dealing with family secrets is never easy." \\
        --reference voice.wav --reference_text "What the voice says."

espeak-ng speaks three digits at a time in two voices. A codec is made of the recordings (k-means over log-mel frames,
50 codes a second), the Trainer trains a Llama from text to codes with `optim="stable_spam"`, and unheard texts are
spoken by one sample, by the best of 16, and by a search that looks for one voice first and for the right words then.
A judge listens to the audio; it is not the verifier of the search, and shares no recording with it. Prints a table,
and writes WAV files to listen to and `speak.png`.

`--released` loads Llasa-1B, X-codec2, Whisper and WavLM from the hub (or from folders) instead, and trains nothing.
Needs `pip install '.[speech,plot]'`, and espeak-ng: `pip install espeakng-loader`, or your system's package. Without
espeak-ng it trains on synthetic tones, and says so.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import torch
from speech.codec import log_mel
from speech.methods import METHODS, best_of, results
from speech.released import Released, speak_with_released_models
from speech.studio import INSTRUCTION, Sizes, Studio, build, small_llama
from speech.voices import SAMPLING_RATE
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_stablespam import FourBitCallback, FourBitConfig
from hf_stablespam.recipes.llasa import SpeechTokenCollator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CANDIDATES = (1, 2, 4, 8, 16)
SMOKE = Sizes(recordings=24, codes=16, verifier=(16, 4), judge=(8, 4), tests=1, max_codes=16)
SHOWN = ("one sample", "best of 16, content", "process search to 12 codes, then content")


@dataclass
class ScriptArguments:
    four_bit: str | None = field(default=None, metadata={"help": "Format of 4-bit linear layers, such as int4."})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs."})


def train(studio: Studio, args: TrainingArguments, four_bit: str | None = None) -> Trainer:
    """An ordinary Trainer; `SpeechTokenCollator` makes its batches."""
    torch.manual_seed(args.seed)
    callbacks = [FourBitCallback(FourBitConfig(four_bit, four_bit, group_size=32))] if four_bit else []
    collator = SpeechTokenCollator(studio.tokenizer, studio.vocabulary, max_length=256, instruction=INSTRUCTION)
    rows = studio.rows()
    held_out = len(rows) // 12
    trainer = Trainer(
        small_llama(studio),
        args,
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        data_collator=collator,
        processing_class=studio.tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def main(command_line: list[str] | None = None) -> None:
    parser = HfArgumentParser((ScriptArguments, Released, TrainingArguments))
    parser.set_defaults(
        optim="stable_spam",
        max_grad_norm=0.0,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_steps=300,
        per_device_train_batch_size=16,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    script, released, args = parser.parse_args_into_dataclasses(command_line)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if released.released:
        speak_with_released_models(released, output)
        return
    if script.smoke:
        args.max_steps, args.eval_steps, args.logging_steps = 2, 2, 2
    studio = build(args.seed, SMOKE if script.smoke else Sizes())
    print(f"{len(studio.recordings)} recordings of {studio.source}")
    model = train(studio, args, script.four_bit).model

    spoken, rows = {}, []
    for name, method in METHODS.items():
        found, means = results(model, studio, method, studio.tests, args.seed)
        spoken[name] = found[0].codes
        rows.append((name, means))
    print(f"\n{'':44}wrong words   voice asked for   CPU seconds")
    for name, means in rows:
        print(f"{name:44}{means['error']:>10.1%}{means['voice']:>16.2f}{means['seconds']:>14.2f}")

    curve = {n: results(model, studio, best_of(n, "content"), studio.tests, args.seed)[1] for n in CANDIDATES}
    audio = {f"target: {studio.source}": studio.tests[0].audio}
    audio |= {name: studio.codec(spoken[name]) for name in SHOWN}
    for name, samples in audio.items():
        path = output / f"{re.sub('[^a-z0-9]+', '_', name.split(':')[0])}.wav"
        soundfile.write(path, samples, SAMPLING_RATE)
        print(f"wrote {path}: {len(samples) / SAMPLING_RATE:.2f} s")
    draw(output / "speak.png", audio, studio, curve)


def draw(path: Path, audio: dict[str, np.ndarray], studio: Studio, curve: dict[int, dict[str, float]]) -> None:
    """Spectrograms of the target and of what the Llama spoke, and the error over the number of candidates."""
    figure, axes = plt.subplots(1, len(audio) + 1, figsize=(16, 3.4), layout="constrained")
    for axis, (name, samples) in zip(axes, audio.items(), strict=False):
        axis.imshow(log_mel(samples).T, origin="lower", aspect="auto", extent=(0, len(samples) / SAMPLING_RATE, 0, 64))
        heard = studio.judge.transcribe([log_mel(samples)])[0] or "nothing"
        axis.set_title(f"{name}\nthe judge hears: {heard}", fontsize=8)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("mel band")
    axes[-1].plot(list(curve), [100 * means["error"] for means in curve.values()], marker="o")
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(list(curve), [str(n) for n in curve])
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("candidates, best by content")
    axes[-1].set_ylabel("wrong words, %")
    axes[-1].set_title(f"judge's error over {len(studio.tests)} texts", fontsize=8)
    figure.suptitle(f"“{studio.tests[0].text}” in the {studio.tests[0].voice} voice", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
