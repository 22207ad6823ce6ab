"""Training and evaluation: one loop, compiled over a mesh of all devices."""
