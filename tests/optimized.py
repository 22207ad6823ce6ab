"""Compilation as users have it; the other tests leave the last optimisations out."""

import functools

import jax

optimized_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})
