"""What callbacks need: the optimizer's figures, the logs, state in checkpoints."""
