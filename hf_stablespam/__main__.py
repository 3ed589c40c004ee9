"""`python -m hf_stablespam SCRIPT …` and the console command `hf-stablespam`."""

import importlib
import sys

# Subcommand → the module whose `main(arguments)` it is. A script of that name needs `run` before it.
COMMANDS = {"run": "hf_stablespam.trainer.launcher"}


def main() -> int:
    """Run the subcommand that the first argument names, `run` where it names none; returns the exit status."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    return importlib.import_module(COMMANDS[name]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
