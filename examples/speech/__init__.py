"""What examples/speak.py is made of: voices, a codec, listeners, and the released models."""
