"""Whole methods of the literature, built on the Trainer, PEFT and TRL; each is a folder with its own public names.

The rule of this folder: a recipe may import everything else of the package, nothing imports a recipe, and no recipe
imports another. Nothing is loaded here: `from hf_stablespam.recipes.NAME import …`.
"""
