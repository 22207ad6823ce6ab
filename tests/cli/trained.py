"""A small network with weights, and pictures, for the tests of what one does with them."""

import functools

import jax
import numpy as np
import PIL.Image

from cbam_jax import create_model
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.interop.pretrained import Pretrained

CLASSES = ('cat', 'dog', 'newt')
PREPROCESSING = Preprocessing(32, 36, 'bicubic')
FIELDS = {'stem': 'cifar', 'width': 0.125, 'stage_sizes': (1, 1), 'num_classes': 3}


def network(attention='cbam', seed=0) -> Pretrained:
  """A network of random weights, whose logits differ enough to tell them apart."""
  model = create_model('resnet18', attention=attention, **FIELDS)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == 'var':
      return rng.uniform(0.8, 1.2, leaf.shape).astype(np.float32)
    if name == 'scale':
      return rng.uniform(0.4, 0.8, leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if name == 'kernel' else 50
    return (rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)).astype(np.float32)

  return Pretrained(model, jax.tree.map_with_path(draw, shapes), PREPROCESSING, CLASSES)


def picture(seed=0, height=40, width=50):
  """Pixels, uint8 (height, width, 3): soft blobs, so that networks see more than noise."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
  return np.asarray(PIL.Image.fromarray(small).resize((width, height)))


def write_pictures(folder, count=3):
  """`count` JPEG files, and one that is none."""
  folder.mkdir(exist_ok=True)
  for seed in range(count):
    PIL.Image.fromarray(picture(seed)).save(folder / f'{seed}.jpg', quality=95)
  (folder / 'broken.jpg').write_bytes(b'\xff\xd8 no picture')
  return folder


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model, variables, images):
  return jax.nn.softmax(model.apply(variables, images, train=False))


def probabilities(network, path):
  """What the network makes of a picture file, by other means than the command line's."""
  seen = network.preprocessing(path.read_bytes())
  images = network.preprocessing.normalize(seen[None])
  return np.asarray(_probabilities(network.model, network.variables, images))[0]
