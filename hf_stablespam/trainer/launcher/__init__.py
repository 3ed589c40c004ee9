"""`python -m hf_stablespam SCRIPT …`: any training script, unchanged, with what the flags ask for."""
