"""What does a gradient spike do to AdamW, and what to Stable-SPAM? Two runs with injected spikes, and a report.

    python examples/injected_spikes.py --output_dir runs/spikes --screenshot

Every 25 steps, before anything clips, one entry in a thousand of one weight's gradient becomes 1000 times as large
as the largest entry of that gradient. Otherwise the two runs are the same pretraining of a tiny Llama, in 4 bits.
The report marks the spikes and names the tensor. `--screenshot` takes its picture (needs Chromium, its driver, and
selenium).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import pretrain
import torch
from transformers import TrainerCallback

from hf_stablespam.monitor.report import write_report

OPTIMIZERS = {
    "adamw": ["--optim", "adamw_torch", "--max_grad_norm", "1"],
    "stable_spam": ["--optim", "stable_spam", "--max_grad_norm", "0"],
}
TENSOR = "model.layers.1.mlp.down_proj.weight"


class SpikeInjector(TrainerCallback):
    """Makes a few entries of one gradient very large, in every `every`-th update step."""

    def __init__(self, every: int, size: float = 1000.0) -> None:
        self.every, self.size, self.now = every, size, False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **others: Any) -> None:
        # A hook, because it runs in the backward pass: before the Trainer's clipping.
        model.get_parameter(TENSOR).register_hook(self.spiked)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.now = (state.global_step + 1) % self.every == 0

    def spiked(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient with its spike, where one is due."""
        if not self.now:
            return gradient
        chosen = torch.arange(gradient.numel(), device=gradient.device).view_as(gradient) % 1000 == 0
        return torch.where(chosen, self.size * gradient.abs().max(), gradient)


def take_screenshot(page: Path, picture: Path, width: int = 1300) -> None:
    """The whole page, as headless Chromium shows it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-background-networking"):
        options.add_argument(f"--{switch}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_window_size(width, 900)
        browser.get(page.resolve().as_uri())
        while not browser.execute_script("return Bokeh.documents.some(document => document.is_idle)"):
            time.sleep(0.1)
        browser.set_window_size(width, browser.execute_script("return document.documentElement.scrollHeight") + 150)
        time.sleep(2)  # the diagrams that came into view are drawn
        browser.save_screenshot(str(picture))
    finally:
        browser.quit()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/spikes"), help="default runs/spikes")
    parser.add_argument("--steps", type=int, default=120, help="update steps of each run; default 120")
    parser.add_argument("--every", type=int, default=25, help="a spike in every N-th step; default 25")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--screenshot", action="store_true", help="also write report.png, with Chromium")
    options = parser.parse_args(arguments)
    steps, every = (4, 2) if options.smoke else (options.steps, options.every)

    for name, optimizer in OPTIMIZERS.items():
        shared = f"--max_steps {steps} --learning_rate 3e-3 --warmup_steps {max(1, steps // 10)} --logging_steps 2"
        shared += f" --per_device_train_batch_size 16 --eval_strategy steps --eval_steps {max(1, steps // 12)}"
        shared += " --max_eval_samples 32 --four_bit int4 --gradient_norms_by block --record_spikes"
        shared += " --save_strategy no --report_to none --dataloader_pin_memory False"
        folder = options.output_dir / name
        pretrain.main(["--output_dir", str(folder), *optimizer, *shared.split()], [SpikeInjector(every)])
    report = options.output_dir / "report.html"
    write_report([options.output_dir / name for name in OPTIMIZERS], report)
    print(f"Report: {report.resolve()}")
    if options.screenshot:
        take_screenshot(report, report.with_suffix(".png"))


if __name__ == "__main__":
    main()
