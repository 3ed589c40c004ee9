"""What `optim_args` and the fields beside it may say: reading, checks, GaLore's groups."""
