"""What is measured of a step for the logs, and how it reaches them."""
