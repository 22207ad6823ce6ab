"""Images a second from JPEG files to batches, beside tf.data and PyTorch on the same cores.

Every peer reads the same files (500x375, about 110 KB, made here), cuts the same kind of random
crop, resizes it to 224, flips half of them and gives uint8 batches of 64. Each has a process group
of its own, which is stopped while the others take their turn; what it had read ahead by then is
taken and not timed. The tables give medians, and the medians of the ratios round by round: by the
clock, and by the time that the cores spent on the peer, which is the fairer one on a machine that
has other work to do.

  pip install 'cbam-jax[train]'
  python benchmarks/input_pipeline.py [--tensorflow PYTHON] [--torch PYTHON] [--cores 2]

TensorFlow, and torch with torchvision, may be in environments of their own: PYTHON is the
interpreter there. A peer that is not installed is left out, and the output says so.
"""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

BATCH_SIZE = 64
SIZE = 224
FILES = 512
READ_AHEAD = 16  # batches; more than any peer here holds

OURS = ('cbam_jax, threads', 'cbam_jax, processes')
THEIRS = ('tf.data', 'torch DataLoader')

# ---- the files -------------------------------------------------------------------------------


def picture(rng: np.random.Generator, height: int = 375, width: int = 500) -> Image.Image:
  """Noise with the spectrum of natural images, and a few shapes with edges."""
  rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  frequency = np.hypot(rows, columns)
  frequency[0, 0] = 1 / width

  def noise() -> np.ndarray:
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    pixels = np.fft.irfft2(spectrum, (height, width))
    return pixels / pixels.std()

  luminance = noise()
  colours = np.stack([luminance + 0.35 * noise() for _ in range(3)], -1)
  image = Image.fromarray(np.clip(120 + 45 * colours, 0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(6):
    x, y = int(rng.integers(width)), int(rng.integers(height))
    w, h = (int(side) for side in rng.integers(10, 120, size=2))
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((x, y, x + w, y + h), fill=tuple(int(level) for level in rng.integers(256, size=3)))
  return image


def make_files(root: pathlib.Path) -> int:
  """Writes the files as an image folder of 8 classes; returns their mean size in bytes."""
  sizes = []
  for number in range(FILES):
    folder = root / 'train' / str(number % 8)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f'{number}.jpg'
    picture(np.random.default_rng(number)).save(file, quality=90)
    sizes.append(file.stat().st_size)
  return round(statistics.mean(sizes))


# ---- the peers, each in a process of its own -------------------------------------------------


def cbam_jax_batches(root: pathlib.Path, workers: int) -> Iterator[Any]:
  from cbam_jax.data import open_source, train_batches
  from cbam_jax.data.transforms import train_transform

  source = open_source('folder', 'train', str(root))
  transform = train_transform('crop_flip', SIZE)
  return train_batches(
    source, transform, BATCH_SIZE, seed=0, start_step=0, stop_step=10**6, workers=workers
  )


def tf_data_batches(root: pathlib.Path) -> Iterator[Any]:
  import tensorflow as tf

  # tf.image.sample_distorted_bounding_box draws smaller boxes, which are less work; these are drawn
  # beforehand as everybody else's, so that they cost nothing here.
  boxes = tf.constant(torchvision_boxes(10_000), tf.int32)

  def load(file: Any, label: Any) -> tuple[Any, Any]:
    data = tf.io.read_file(file)
    box = boxes[tf.random.uniform([], maxval=len(boxes), dtype=tf.int32)]
    image = tf.image.decode_and_crop_jpeg(data, box, channels=3)
    image = tf.image.random_flip_left_right(tf.image.resize(image, [SIZE, SIZE]))
    return tf.cast(image, tf.uint8), label

  files = sorted((root / 'train').rglob('*.jpg'))
  dataset = tf.data.Dataset.from_tensor_slices(
    ([str(file) for file in files], [int(file.parent.name) for file in files])
  )
  dataset = dataset.shuffle(len(files)).repeat().map(load, num_parallel_calls=tf.data.AUTOTUNE)
  return iter(dataset.batch(BATCH_SIZE, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def torchvision_boxes(count: int, height: int = 375, width: int = 500) -> list[list[int]]:
  """Top, left, height and width of boxes of 8 to 100 % of the area, at aspects of 3/4 to 4/3."""
  rng = np.random.default_rng(0)
  boxes: list[list[int]] = []
  while len(boxes) < count:
    area = height * width * rng.uniform(0.08, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if w <= width and h <= height:
      boxes.append([int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w])
  return boxes


def torch_batches(root: pathlib.Path, workers: int) -> Iterator[Any]:
  import torch
  from torchvision import datasets, transforms

  transform = transforms.Compose(
    [
      transforms.RandomResizedCrop(SIZE),
      transforms.RandomHorizontalFlip(),
      transforms.PILToTensor(),
    ]
  )
  loader = torch.utils.data.DataLoader(
    datasets.ImageFolder(str(root / 'train'), transform),
    BATCH_SIZE,
    shuffle=True,
    num_workers=workers,
    drop_last=True,
    persistent_workers=True,
  )
  while True:
    yield from loader


def serve(peer: str, root: pathlib.Path, cores: int) -> None:
  """Takes as many batches as each line of the input says, and answers with the seconds."""
  batches = {
    OURS[0]: lambda: cbam_jax_batches(root, workers=0),
    OURS[1]: lambda: cbam_jax_batches(root, workers=cores),
    THEIRS[0]: lambda: tf_data_batches(root),
    THEIRS[1]: lambda: torch_batches(root, workers=cores),
  }[peer]()
  for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
      next(batches)
    print(time.perf_counter() - start, flush=True)


class Peer:
  """A peer's process group, which runs during its own turns only."""

  def __init__(self, name: str, python: str, root: pathlib.Path, cores: int):
    self.process = subprocess.Popen(
      [python, __file__, '--serve', name, '--root', str(root), '--cores', str(cores)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      start_new_session=True,
    )
    self.take(READ_AHEAD)
    self._signal(signal.SIGSTOP)

  def _signal(self, number: int) -> None:
    os.killpg(self.process.pid, number)

  def take(self, count: int) -> float:
    """Takes batches; returns the seconds."""
    print(count, file=self.process.stdin, flush=True)
    answer = self.process.stdout.readline()
    if not answer:
      raise SystemExit(f'{self.process.args[3]} gave up; run this to see why: {self.process.args}')
    return float(answer)

  def _core_seconds(self) -> float:
    """What all threads of all its processes have used so far."""
    ticks = 0
    for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
      with contextlib.suppress(OSError):
        fields = file.read_text().rpartition(') ')[2].split()  # they start at the third, the state
        if int(fields[2]) == self.process.pid:
          ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')

  def turn(self, count: int) -> tuple[float, float]:
    """Images a second of time over a turn, and images a second of one core's time."""
    self._signal(signal.SIGCONT)
    self.take(READ_AHEAD)
    used = self._core_seconds()
    seconds = self.take(count)
    used = self._core_seconds() - used
    self._signal(signal.SIGSTOP)
    return count * BATCH_SIZE / seconds, count * BATCH_SIZE / used

  def end(self) -> None:
    self._signal(signal.SIGKILL)
    self.process.wait()


def version(python: str, *packages: str) -> str | None:
  """The packages and their versions as `python` has them, or None if one is missing."""
  code = f'from importlib.metadata import version as v; [print(p, v(p)) for p in {packages}]'
  done = subprocess.run([python, '-c', code], capture_output=True, text=True)
  return None if done.returncode else ', '.join(done.stdout.split('\n')[:-1])


# ---- what limits them ------------------------------------------------------------------------


def decoding(files: list[bytes]) -> dict[str, float]:
  """Microseconds of one core an image, the median over five passes."""
  simplejpeg = importlib.import_module('simplejpeg')
  from cbam_jax.data.transforms import train_transform

  transform, rng = train_transform('crop_flip', SIZE), np.random.default_rng(0)
  kinds: dict[str, Callable[[bytes], Any]] = {
    'Pillow, the whole image': lambda data: np.asarray(Image.open(io.BytesIO(data))),
    'simplejpeg, the whole image': simplejpeg.decode_jpeg,
    'simplejpeg at an eighth (little more than entropy decoding)': lambda data: (
      simplejpeg.decode_jpeg(data, min_height=47, min_width=63)
    ),
    "cbam_jax's crop_flip, from a file's bytes to 224x224": lambda data: transform(data, rng),
  }
  seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
  for _ in range(5):
    for kind, decode in kinds.items():
      start = time.thread_time()
      for data in files:
        decode(data)
      seconds[kind].append(time.thread_time() - start)
  return {kind: 1e6 * statistics.median(times) / len(files) for kind, times in seconds.items()}


def processor() -> str:
  for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('model name'):
      return line.partition(': ')[2]
  return platform.processor()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tensorflow', metavar='PYTHON', default=sys.executable)
  parser.add_argument('--torch', metavar='PYTHON', default=sys.executable)
  parser.add_argument('--cores', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batches', type=int, default=48, help='timed in a turn')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  parser.add_argument('--root', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args.serve, args.root, args.cores)
    return

  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
  os.environ['JAX_PLATFORMS'] = 'cpu'
  pythons = dict.fromkeys(OURS, sys.executable)
  own = version(sys.executable, 'grain', 'simplejpeg', 'opencv-python-headless', 'pillow')
  print(f'{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}')
  print(f'Python {platform.python_version()}, {own}')
  for name, python, packages in (
    (THEIRS[0], args.tensorflow, ('tensorflow',)),
    (THEIRS[1], args.torch, ('torch', 'torchvision', 'pillow')),
  ):
    if found := version(python, *packages):
      pythons[name] = python
      print(f'{name}: {found}')
    else:
      print(f'{name} is left out: {python} has no {" and no ".join(packages)}')

  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    print(f'{FILES} files of {make_files(root):,} bytes on average, {args.rounds} rounds\n')
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in pythons}
    peers = {name: Peer(name, python, root, args.cores) for name, python in pythons.items()}
    try:
      for _ in range(args.rounds):
        for name, peer in peers.items():
          rates[name].append(peer.turn(args.batches))
    finally:
      for peer in peers.values():
        peer.end()
    files = [file.read_bytes() for file in sorted(root.rglob('*.jpg'))[:128]]

  others = [name for name in THEIRS if name in rates]
  for number, unit in enumerate(('images/s', "images for a second of a core's time")):
    print(f'| | {unit} | ' + ' | '.join(f'times {name}' for name in others) + ' |')
    print('|---' * (2 + len(others)) + '|')
    measured = {name: [pair[number] for pair in pairs] for name, pairs in rates.items()}
    for name, values in measured.items():
      ratios = [
        statistics.median(a / b for a, b in zip(values, measured[other], strict=True))
        for other in others
      ]
      cells = ' | '.join([f'{statistics.median(values):.0f}', *(f'{r:.2f}' for r in ratios)])
      print(f'| {name} | {cells} |')
    print()
  print('| on one core | µs an image |\n|---|---|')
  for kind, microseconds in decoding(files).items():
    print(f'| {kind} | {microseconds:.0f} |')


if __name__ == '__main__':
  main()
