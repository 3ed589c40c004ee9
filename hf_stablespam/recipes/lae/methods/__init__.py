"""The paper's three PEFT methods, for PEFT: adapter beside the attention, LoRA, and prefix; with learnable scalars."""
