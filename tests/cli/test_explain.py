"""What networks see, drawn and scored from the command line."""

import base64
import functools
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from cbam_jax import explain
from cbam_jax.cli import main
from cbam_jax.cli.explain import _panel_names
from cbam_jax.explain.figures import draw_panel
from cbam_jax.explain.pictures import bars, coloured, overlay, stretched
from cbam_jax.explain.score import score
from cbam_jax.explain.views import AttentionMap, ClassMap, View, view
from cbam_jax.interop.pretrained import save_pretrained
from tests.cli.trained import CLASSES, network, picture, write_pictures


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Folders 'net_none' and 'net_cbam' of networks, and 'pictures'."""
  home = tmp_path_factory.mktemp('home')
  for attention in ('none', 'cbam'):
    made = network(attention)
    save_pretrained(
      home / f'net_{attention}',
      made.model,
      made.variables,
      preprocessing=made.preprocessing,
      classes=made.classes,
    )
  write_pictures(home / 'pictures', count=2)
  return home


class Page(HTMLParser):
  """The tags, texts and images of a page, which must close what it opens."""

  def __init__(self, text):
    super().__init__()
    self.open, self.images, self.texts, self.tags = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    if tag == 'img':
      self.images.append(dict(attributes)['src'])
    if tag not in ('img', 'meta', 'br', 'p', 'rect'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in ('p', 'rect'):
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def test_every_picture_gets_a_panel_and_a_place_in_the_report(home, tmp_path, capsys):
  weights = f'--weights={home}/net_{{attention}}'
  command = ['explain', str(home / 'pictures'), weights, '--compare=none,cbam', '--class=newt']
  assert main([*command, f'--out={tmp_path / "out"}']) == 1  # for a picture that is none
  output = capsys.readouterr()
  assert 'broken.jpg cannot be read' in output.err
  assert 'shows 2 pictures' in output.out
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['0.png', '1.png', 'report.html']
  panel = np.asarray(PIL.Image.open(tmp_path / 'out' / '0.png'))
  assert panel.shape[0] > 600
  assert panel.std() > 20

  text = (tmp_path / 'out' / 'report.html').read_text()
  page = Page(text)
  assert page.open == []
  words = ' '.join(page.texts)
  for part in ('0.jpg', '1.jpg', 'resnet18 + cbam', 'newt', 'stage2/block1', 'Grad-CAM'):
    assert part in words
  assert not re.search(r'(src|href)="(?!data:)', text)  # nothing but itself
  assert '<script' not in text
  # The image and one or two maps of two networks, and 2 attention maps, for each picture.
  assert 2 * (1 + 2 + 2) <= len(page.images) <= 2 * (1 + 4 + 2)
  for source in page.images:
    PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))).verify()


def test_a_name_may_be_any_bytes(home, tmp_path, capsys):
  # Neither UTF-8, nor what matplotlib could read as a formula.
  file = tmp_path / os.fsdecode(b'caf\xe9 $\\q$.jpg')
  shutil.copy(home / 'pictures' / '0.jpg', file)
  broken = tmp_path / os.fsdecode(b'\xff.jpg')
  shutil.copy(home / 'pictures' / 'broken.jpg', broken)
  weights, out = f'--weights={home / "net_none"}', tmp_path / os.fsdecode(b'out\xe9')
  assert main(['explain', str(file), str(broken), weights, f'--out={out}']) == 1
  output = capsys.readouterr()
  assert f'{tmp_path}/out\ufffd/report.html shows 1 picture;' in output.out
  assert f'{tmp_path}/\ufffd.jpg cannot be read' in output.err
  assert sorted(out.iterdir()) == sorted([out / f'{file.stem}.png', out / 'report.html'])
  title = f'{tmp_path}/caf\ufffd $\\q$.jpg'
  assert title in Page((out / 'report.html').read_text('utf-8')).texts


def test_panels_have_names_of_their_own():
  paths = ['x/a.jpg', 'y/a.jpg', 'a-0.jpg', 'b.jpg', 'B.png', 'c.jpg']
  assert _panel_names([Path(path) for path in paths]) == [
    'a-1.png',
    'a-2.png',
    'a-0.png',
    'b-0.png',
    'B-1.png',
    'c.png',
  ]


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
  name = '$\\q$'
  cam = np.ones((2, 2))
  drawn = View(
    name, ((name, 0.5),), (ClassMap(name, 0.5, cam),), (AttentionMap(name, cam, cam[0]),)
  )
  draw_panel(tmp_path / 'panel.png', name, picture(), [drawn])


def test_networks_of_one_kind_stay_apart(home, tmp_path, monkeypatch):
  for name in ('se', 'cbam'):
    (tmp_path / name).symlink_to(home / 'net_cbam')
  (tmp_path / 'none').symlink_to(home / 'net_none')
  seen = []
  monkeypatch.setattr('cbam_jax.cli.explain._score', lambda _, networks: seen.extend(networks))
  command = ['explain', '--score', '--boxes=b', '--images-dir=i', '--compare=none,se,cbam']
  assert main([*command, f'--weights={tmp_path}/{{attention}}']) == 0
  title = 'resnet18 + cbam'
  assert seen == ['resnet18', f'{title} ({tmp_path / "se"})', f'{title} ({tmp_path / "cbam"})']


def test_a_view_is_what_the_functions_say():
  made = network()
  images = [made.preprocessing(picture(seed)) for seed in range(3)]
  views = list(view(made, 'net', images, chosen=2, top=2))
  normalized = made.preprocessing.normalize(np.stack(images))
  apply = jax.jit(functools.partial(made.model.apply, train=False))
  logits = np.asarray(apply(made.variables, normalized))
  maps = jax.jit(functools.partial(explain.attention_maps, made.model))(made.variables, normalized)
  grad_cam = jax.jit(functools.partial(explain.grad_cam, made.model, stage='stage2'))
  for i, seen in enumerate(views):
    found = int(np.argmax(logits[i]))
    assert [name for name, _ in seen.top] == [CLASSES[c] for c in np.argsort(-logits[i])[:2]]
    classes = [found] if found == 2 else [found, 2]
    assert [m.name for m in seen.class_maps] == [CLASSES[c] for c in classes]
    for class_map, number in zip(seen.class_maps, classes, strict=True):
      expected = np.asarray(grad_cam(made.variables, normalized[i : i + 1], number)[0])
      np.testing.assert_allclose(class_map.cam, expected, atol=1e-5 * max(expected.max(), 1e-3))
    assert [a.name for a in seen.attention] == [name.removesuffix('/attention') for name in maps]
    first = maps['stage1/block1/attention']
    np.testing.assert_allclose(seen.attention[0].spatial, first['spatial'][i], atol=1e-6)
    np.testing.assert_allclose(seen.attention[0].channel, first['channel'][i], atol=1e-6)


def test_what_stands_out_is_of_no_class():
  made = network()
  (seen,) = view(made, 'net', [made.preprocessing(picture())], method='eigen_cam')
  (found,) = seen.class_maps
  assert (found.name, found.probability, found.percent) == ('no class', None, '')
  assert seen.top[0][0] in CLASSES


# ---- a score ---------------------------------------------------------------------------------


@pytest.fixture
def boxed(tmp_path):
  """Pictures with boxes in COCO's format, and the boxes."""
  (tmp_path / 'images').mkdir()
  rng = np.random.default_rng(0)
  images, annotations = [], []
  for number in range(9):
    PIL.Image.fromarray(picture(number)).save(tmp_path / 'images' / f'{number}.png')
    images.append({'id': number, 'file_name': f'{number}.png', 'width': 50, 'height': 40})
    left, top = rng.integers(5, 20, 2).tolist()
    annotations.append(
      {'image_id': number, 'category_id': number % 3, 'bbox': [left, top, 12, 12], 'iscrowd': 0}
    )
  categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES)]
  content = {'images': images, 'annotations': annotations, 'categories': categories}
  (tmp_path / 'boxes.json').write_text(json.dumps(content))
  return tmp_path, annotations


@pytest.mark.slow
def test_networks_are_scored_on_the_same_boxes(home, boxed, capsys):
  folder, annotations = boxed
  command = ['explain', '--score', f'--boxes={folder / "boxes.json"}', '--compare=none,cbam']
  command += [f'--images-dir={folder / "images"}', f'--weights={home}/net_{{attention}}']
  assert main([*command, '--json']) == 0
  result = json.loads(capsys.readouterr().out)
  assert list(result['networks']) == ['resnet18', 'resnet18 + cbam']
  assert list(result['differences']) == ['resnet18 + cbam - resnet18']

  made, expected = network(), []
  grad_cam = jax.jit(functools.partial(explain.grad_cam, made.model, stage='stage2'))
  for number, annotation in enumerate(annotations):
    image = made.preprocessing.normalize(made.preprocessing(picture(number))[None])
    cam = grad_cam(made.variables, image, number % 3)[0]
    # The shorter side of 40 becomes 36, the longer 45, of which 6 (of 45 - 32 = 13, rounded to
    # even) are cut off on the left and 2 above.
    left, top, width, height = annotation['bbox']
    x, y = 0.9 * left - 6, 0.9 * top - 2
    box = np.clip([[x, y, x + 0.9 * width, y + 0.9 * height]], 0, 32)
    expected.append(score(np.asarray(cam), box, (32, 32)))
  got = result['networks']['resnet18 + cbam']
  assert got['count'] == 9
  assert got['pointing']['value'] == pytest.approx(np.mean([s.hit for s in expected]))
  assert got['energy']['value'] == pytest.approx(np.mean([s.energy for s in expected]), abs=1e-4)

  assert main(command) == 0
  output = capsys.readouterr().out
  assert 'Grad-CAM, 9 class maps' in output
  assert 'resnet18 + cbam - resnet18' in output


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--compare=none,cbam'], 'needs a place for each in --weights'),
    (['--compare=none,cbma'], "Did you mean 'cbam'"),
    (['--compare=cbam,cbam'], 'has a name twice'),
    (['--method=eigen_cam', '--class=newt'], 'Eigen-CAM knows no classes'),
    (['--class=newd'], "Did you mean 'newt'"),
    (['--class=zebra'], 'one of the names of the classes: '),
    (['--class=3'], 'has classes 0 to 2'),
    (['--method=gradcam'], "Did you mean 'grad_cam'"),
    (['--stage=stage5'], 'stage5'),
    (['--score'], '--score takes --boxes and --images-dir'),
  ],
)
def test_what_cannot_be_drawn_is_refused(home, tmp_path, capsys, options, message):
  command = ['explain', str(home / 'pictures' / '0.jpg'), f'--weights={home / "net_cbam"}']
  assert main([*command, f'--out={tmp_path / "out"}', *options]) == 2
  output = capsys.readouterr()
  assert message in output.err
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('out', ['.', 'link', 'seen/..'])
def test_pictures_are_not_replaced_by_their_panels(home, tmp_path, capsys, monkeypatch, out):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'seen').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path)
  shutil.copy(home / 'pictures' / '1.jpg', 'shirt.jpg')
  PIL.Image.fromarray(picture()).save('boot.png')
  before = Path('boot.png').read_bytes()
  assert main(['explain', 'shirt.jpg', 'boot.png', '--weights=nowhere', f'--out={out}']) == 2
  message = capsys.readouterr().err
  assert f'{Path(out) / "boot.png"} is one of the pictures' in message
  assert 'choose another --out' in message
  assert Path('boot.png').read_bytes() == before


def test_a_folder_to_draw_into_is_needed(home, capsys):
  assert main(['explain', str(home / 'pictures'), f'--weights={home / "net_cbam"}']) == 2
  assert 'name pictures, and a folder' in capsys.readouterr().err


# ---- pictures --------------------------------------------------------------------------------


def test_colours_grow_lighter():
  levels = coloured(np.linspace(0, 1, 50)[None])[0].astype(float) @ [0.2126, 0.7152, 0.0722]
  assert np.all(np.diff(levels) > 0)


def test_an_overlay_is_grey_where_nothing_is():
  image = np.full((8, 8, 3), (255, 0, 0), np.uint8)
  cam = np.zeros((2, 2))
  cam[1, 1] = 3
  seen = overlay(image, cam).astype(int)
  assert np.ptp(seen[0, 0]) < np.ptp(seen[7, 7])
  np.testing.assert_array_equal(overlay(image, cam), overlay(image, 10 * cam))
  assert overlay(image[..., :1], 0 * cam).shape == (8, 8, 3)


def test_stretched_fills_the_scale():
  np.testing.assert_allclose(stretched(np.array([0.4, 0.5, 0.6])), [0, 0.5, 1])
  np.testing.assert_array_equal(stretched(np.full(3, 0.5)), 0)


def test_bars_keep_the_extremes():
  feet, tops, each = bars(np.arange(130) / 130)
  assert each == 3
  assert (len(feet), feet[0], tops[0]) == (44, 0, 2 / 130)
  assert (feet[-1], tops[-1]) == (129 / 130, 129 / 130)
  feet, tops, each = bars(np.array([0.2, 0.7]))
  assert each == 1
  np.testing.assert_array_equal(feet, 0)
  np.testing.assert_array_equal(tops, [0.2, 0.7])
