"""What the optimizers keep: its layout, its storage in few bits, and where it may come from."""
