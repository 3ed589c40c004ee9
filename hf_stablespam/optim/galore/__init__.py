"""GaLore: gradients projected to few directions before the step."""
