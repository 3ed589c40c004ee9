"""The folder that the launcher puts on `PYTHONPATH`, for the processes that a script starts."""
