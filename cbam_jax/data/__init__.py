"""Images to train and evaluate on: sources, augmentation, the loader. Knows no model."""

from cbam_jax.data.loader import Batch, eval_batches, train_batches
from cbam_jax.data.sources import Source, open_source

__all__ = ['Batch', 'Source', 'eval_batches', 'open_source', 'train_batches']
