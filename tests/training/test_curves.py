"""The picture of a run, whatever it has logged so far."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cbam_jax.training.curves import draw_curves


def entry(split: str, epoch: float, loss: float, top1: float) -> dict:
  entry = {'step': int(10 * epoch), 'epoch': epoch, 'split': split, 'loss': loss, 'top1': top1}
  return entry | ({'learning_rate': 0.1 / epoch} if split == 'train' else {})


TRAIN = [entry('train', epoch, 2 / epoch, 0.5 + epoch / 20) for epoch in (0.5, 1, 1.5, 2)]
TEST = [entry('test', 1, 2.5, 0.75), entry('test', 2, 1.5, 0.875), entry('test', 3, 1.6, 0.875)]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
  """The figures that are saved from here on."""
  saved = []
  real = Figure.savefig

  def savefig(self, *args, **kwargs):
    saved.append(self)
    real(self, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', savefig)
  return saved


def test_the_curves_are_what_was_logged(tmp_path, figures):
  draw_curves(TRAIN + TEST, tmp_path / 'curves.png', 'resnet18 + cbam on digits')
  (figure,) = figures
  loss, error, rate = figure.axes
  assert figure.get_suptitle() == 'resnet18 + cbam on digits'
  for rows, loss_line, error_line in zip((TRAIN, TEST), loss.lines, error.lines, strict=True):
    epochs = [row['epoch'] for row in rows]
    np.testing.assert_array_equal(loss_line.get_xydata().T, [epochs, [row['loss'] for row in rows]])
    np.testing.assert_allclose(error_line.get_ydata(), [100 * (1 - row['top1']) for row in rows])
  np.testing.assert_allclose(rate.lines[0].get_ydata(), [row['learning_rate'] for row in TRAIN])
  assert [text.get_text() for text in error.get_legend().get_texts()] == ['train', 'test']
  # Of two equally good ones the later, as among checkpoints.
  assert error.get_title() == 'Top-1 error: 12.50 % at the best epoch, 3'


@pytest.mark.parametrize('entries', [[], TRAIN, TEST, TRAIN[:1], [entry('test', 1, 1e-9, 1.0)]])
def test_a_run_can_have_logged_little(tmp_path, entries):
  draw_curves(entries, tmp_path / 'curves.png', 'little')
  with Image.open(tmp_path / 'curves.png') as picture:
    picture.load()
    assert picture.format == 'PNG'
