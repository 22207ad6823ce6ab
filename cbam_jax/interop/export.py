"""Networks as files that run without this package: StableHLO and ONNX, checked as written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import jaxpr_as_fun

from cbam_jax.attention import CBAM
from cbam_jax.errors import ChannelsError, RunError, UserError, first_line, require
from cbam_jax.files import whole_file
from cbam_jax.layers import any_platform
from cbam_jax.models.base import Classifier

PLATFORMS = ('cpu', 'cuda', 'tpu')

BATCHES = (1, 3)
"""Sizes of the batches that an artifact is checked with."""

Normalize: TypeAlias = Callable[[jax.Array], jax.Array]

# These run in a process that knows nothing of this package, as the artifact's users do.
_RUN_STABLEHLO = """
import sys
import jax
import numpy as np
from jax import export
artifact, images, logits = sys.argv[1:]
with open(artifact, 'rb') as file:
  network = export.deserialize(bytearray(file.read()))
np.savez(logits, *(np.asarray(jax.jit(network.call)(x)) for x in np.load(images).values()))
"""
_RUN_ONNX = """
import sys
import numpy as np
import onnxruntime
artifact, images, logits = sys.argv[1:]
session = onnxruntime.InferenceSession(artifact, providers=['CPUExecutionProvider'])
np.savez(logits, *(session.run(['logits'], {'images': x})[0] for x in np.load(images).values()))
"""


def export_stablehlo(
  model: Classifier,
  variables: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  image_size: int = 224,
  channels: int = 3,
  normalize: Normalize | None = None,
  tolerance: float | None = None,
) -> float:
  """Writes a network as an artifact of `jax.export`, for CPU, CUDA and TPU, its weights within.

  The artifact takes images (b, image_size, image_size, channels), any b, to logits
  (b, num_classes). Before the file appears, another process, which imports JAX and NumPy alone,
  runs it on a CPU beside the network itself.

  Args:
    model: A network.
    variables: Its variables.
    path: The file to write.
    image_size: Side of the images, pixels.
    channels: Channels of the images.
    normalize: None for an artifact that takes float32 images, normalised. Or what makes these of
      pixels, such as `Preprocessing.normalize`; then it takes uint8 pixels and does so itself.
    tolerance: Largest difference of a logit that passes, over the largest logit; None for 1e-4, or
      ten roundings of a coarser type that the network computes in.

  Returns:
    The largest difference that was found, over the largest logit.

  Raises:
    UserError: If the variables or the images are not the network's.
    MissingExtraError: If a package that writes it is not installed.
    RunError: If the logits differ, or the file cannot be written; no file is left then.
  """
  require('flatbuffers', 'export')
  variables = jax.device_get(dict(variables))
  logits, images = _traceable(model, variables, image_size, channels, normalize)
  exported = export.export(jax.jit(lambda x: logits(variables, x)), platforms=PLATFORMS)(images)
  expected = functools.partial(jax.jit(logits), variables)
  with whole_file(Path(path).expanduser()) as partial:
    partial.write_bytes(exported.serialize())
    return _check(partial, _RUN_STABLEHLO, expected, images, _tolerance(tolerance, model))


def load_stablehlo(path: str | os.PathLike[str]) -> export.Exported:
  """Reads what `export_stablehlo` wrote: `jax.jit(load_stablehlo(path).call)(images)`.

  Without this package, `jax.export.deserialize` does the same with less to say about what is wrong.

  Raises:
    UserError: If there is no such file, or it is damaged.
    MissingExtraError: If the package that reads it is not installed.
  """
  require('flatbuffers', 'export')
  path = Path(path).expanduser()
  try:
    return export.deserialize(bytearray(path.read_bytes()))
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error}); name a file of export_stablehlo.') from error
  # What reading a damaged file runs into, wherever the damage is.
  except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
    raise UserError(
      f'{path} is damaged or no artifact of jax.export ({first_line(error)}); export it again.'
    ) from error


def export_onnx(
  model: Classifier,
  variables: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  image_size: int = 224,
  channels: int = 3,
  normalize: Normalize | None = None,
  tolerance: float | None = None,
) -> float:
  """Writes a network as an ONNX model, its weights within; it computes in float32.

  Its input 'images' and output 'logits' are those of `export_stablehlo`, as are the arguments, what
  is returned and raised, and the check, which onnxruntime does in a process without JAX.
  """
  jax2onnx = require('jax2onnx', 'onnx')
  onnx = require('onnx', 'onnx')
  require('onnxruntime', 'onnx')
  tolerance = _tolerance(tolerance, model)
  # onnxruntime has no bfloat16 convolution on CPUs.
  model = model.clone(dtype=jnp.float32)
  variables = jax.tree.map(lambda a: np.asarray(a, np.float32), dict(variables))
  logits, images = _traceable(model, variables, image_size, channels, normalize)
  # As a jaxpr, because jax2onnx replaces functions of jax.numpy that Python code of ours calls.
  with any_platform():
    function = jaxpr_as_fun(jax.make_jaxpr(lambda x: logits(variables, x))(images))
  with _without_warnings_of('onnx_ir'):
    proto = jax2onnx.to_onnx(
      lambda x: function(x)[0],
      inputs=[images],
      model_name=type(model).__name__,
      input_names=['images'],
      output_names=['logits'],
      return_mode='proto',
    )
  _lay_out_pools(onnx, proto.graph)
  with whole_file(Path(path).expanduser()) as partial:
    onnx.save(proto, partial)
    expected = functools.partial(jax.jit(logits), variables)
    return _check(partial, _RUN_ONNX, expected, images, tolerance)


FORMATS: dict[str, Callable[..., float]] = {'stablehlo': export_stablehlo, 'onnx': export_onnx}


def _traceable(
  model: Classifier,
  variables: Mapping[str, Any],
  image_size: int,
  channels: int,
  normalize: Normalize | None,
) -> tuple[Callable[[Any, Any], Any], jax.ShapeDtypeStruct]:
  """The network as a function of variables and images, and these images, any number of them."""
  model = _portable(model)
  if image_size < 1 or channels < 1:
    raise UserError(
      f'images of {image_size}x{image_size} with {channels} channels; all must be at least 1.'
    )

  def logits(variables: Any, images: Any) -> Any:
    inputs = images if normalize is None else normalize(images)
    return model.apply(variables, inputs, train=False)

  (batch,) = export.symbolic_shape('b')
  dtype = jnp.float32 if normalize is None else jnp.uint8
  images = jax.ShapeDtypeStruct((batch, image_size, image_size, channels), dtype)
  try:
    jax.eval_shape(logits, variables, images)
  except (flax.errors.FlaxError, ChannelsError) as error:
    raise UserError(
      f'the variables are not those of this {type(model).__name__} for images of {channels} '
      f'channels ({first_line(error)}); give what its init returns, with other values, and its '
      'channels.'
    ) from error
  return logits, images


def _portable(model: Classifier) -> Classifier:
  """The network without kernels of Pallas, each of which is of one platform alone."""
  if model.attention is None:
    return model
  made = model.attention(name='any')
  if type(made) is not CBAM or not made.fusible or made.implementation == 'plain':
    return model
  fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
  del fields['parent'], fields['name']
  attention = functools.partial(CBAM, **{**fields, 'implementation': 'xla'})
  return model.clone(attention=attention)


def _tolerance(told: float | None, model: Classifier) -> float:
  return max(1e-4, 10 * float(jnp.finfo(model.dtype).eps)) if told is None else told


def _check(
  artifact: Path,
  script: str,
  expected: Callable[[np.ndarray], Any],
  images: jax.ShapeDtypeStruct,
  tolerance: float,
) -> float:
  """The largest difference of a logit of `script` from those expected, over the largest logit.

  Raises:
    RunError: If it is above `tolerance`, or the artifact does not run.
  """
  rng = np.random.default_rng(0)
  shape = images.shape[1:]
  if images.dtype == jnp.uint8:
    batches = [rng.integers(0, 256, (n, *shape), np.uint8) for n in BATCHES]
  else:
    batches = [rng.standard_normal((n, *shape), np.float32) for n in BATCHES]
  files = artifact.with_name('images.npz'), artifact.with_name('logits.npz')
  np.savez(files[0], *batches)
  x64 = str(jax.config.read('jax_enable_x64'))
  # On a CPU: this process may hold the only accelerator. Without the folder it is started in.
  finished = subprocess.run(
    [sys.executable, '-P', '-c', script, artifact, *files],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': x64},
    capture_output=True,
    text=True,
  )
  if finished.returncode:
    what = (finished.stderr.strip().splitlines() or [f'exit status {finished.returncode}'])[-1]
    raise RunError(
      f'{artifact.name} was made, but does not run in a process of its own ({what}); nothing is '
      'written. Check that the packages of the extra are the versions that it asks for.'
    )
  # An accelerator's default precision would be what differs.
  with jax.default_matmul_precision('highest'):
    logits = [np.asarray(expected(batch)) for batch in batches]
  with np.load(files[1]) as found:
    shares = [
      np.max(np.abs(ours - theirs)) / (np.max(np.abs(ours)) or 1)
      for ours, theirs in zip(logits, found.values(), strict=True)
    ]
  difference = float(np.max(shares))  # which, unlike max(), keeps what is not a number
  if not difference <= tolerance:  # nor if it is not a number
    raise RunError(
      f"the logits of {artifact.name} differ from the network's own by {difference:.1e} of the "
      f'largest, and {tolerance:.1e} is allowed; nothing is written. Check that the variables are '
      'trained and finite; if the network magnifies rounding that far, allow more.'
    )
  return difference


def _lay_out_pools(onnx: Any, graph: Any) -> None:
  """Writes the max pools of a graph as runtimes take them, over two axes of (N, C, H, W).

  jax2onnx 0.17 has them over four, of (1, 1, N, H, W, C), which onnxruntime refuses.
  """
  makers = {name: node for node in graph.node for name in node.output}
  takers = {name: node for node in graph.node for name in node.input}
  for pool in [node for node in graph.node if node.op_type == 'MaxPool']:
    fields = {field.name: list(field.ints) for field in pool.attribute}
    if len(fields['kernel_shape']) != 4:
      continue
    (features,), (pooled,) = pool.input, pool.output
    unsqueeze, squeeze = makers[features], takers[pooled]
    first_unsqueeze = makers[unsqueeze.input[0]]
    pads = fields.get('pads', [0] * 8)
    before = onnx.helper.make_node(
      'Transpose', first_unsqueeze.input[:1], [features], unsqueeze.name, perm=[0, 3, 1, 2]
    )
    over_two_axes = onnx.helper.make_node(
      'MaxPool',
      [features],
      [pooled],
      pool.name,
      kernel_shape=fields['kernel_shape'][1:3],
      strides=fields['strides'][1:3],
      pads=pads[1:3] + pads[5:7],
    )
    after = onnx.helper.make_node(
      'Transpose', [pooled], squeeze.output, squeeze.name, perm=[0, 2, 3, 1]
    )
    for old, new in ((unsqueeze, before), (pool, over_two_axes), (squeeze, after)):
      old.CopyFrom(new)
    graph.node.remove(first_unsqueeze)
  # What was said of shapes, and the axes to squeeze, are those of the pools as they were.
  del graph.value_info[:]
  used = {name for node in graph.node for name in node.input}
  for i in reversed(range(len(graph.initializer))):
    if graph.initializer[i].name not in used:
      del graph.initializer[i]


@contextlib.contextmanager
def _without_warnings_of(name: str) -> Iterator[None]:
  logger = logging.getLogger(name)
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)
