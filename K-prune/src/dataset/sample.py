"""The sample of training rows on which K-prune measures knowledge."""

import numpy as np
import torch

from transformer.batching import batches
from transformer.features import Features

BATCH_TOKENS = 4096  # in one batch of the sample, padding included
BATCH_ROWS = 32


def draw_sample(features: Features, num_tokens: int, seed: int) -> Features:
    """Draw rows at random, each at most once, until they hold `num_tokens` word pieces.

    All rows, where they hold fewer.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).numpy()
    tokens = np.cumsum(features.lengths[order])
    rows = 1 + int(np.searchsorted(tokens, num_tokens))
    return features.subset(order[:rows])


def sample_batches(sample: Features) -> list[dict[str, torch.Tensor]]:
    """Split a sample into batches of similar lengths, each padded to its longest row."""
    rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // int(sample.lengths.max())))
    return [sample.collate(indices) for indices in batches(sample.lengths, rows)]
