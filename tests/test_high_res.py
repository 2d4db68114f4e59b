"""Large images: what saves memory changes no result, the schedule is shifted as it should, no pixel is invented."""

import pytest
import torch
from test_unet import error, results

from engine.unet import FastUnet


def checkpointed_pair(**architecture) -> tuple[FastUnet, FastUnet]:
    """The same network twice, the second with checkpointing on."""
    networks = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        networks.append(FastUnet(dim=16, dim_mults=(1, 2, 2), **architecture).train())
        networks[-1].checkpointing = checkpointing
    return tuple(networks)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient(dropout, autocast):
    found = []
    for network in checkpointed_pair(dropout=dropout):
        torch.manual_seed(5)  # of the dropout
        found.append(results(network, autocast))
    for plain, checkpointed in zip(*found, strict=True):
        assert error(checkpointed, plain) < (1e-2 if autocast and dropout else 1e-6)


def test_checkpointing_keeps_less():
    kept = []
    for network in checkpointed_pair():
        sizes: dict[int, int] = {}  # bytes by storage, each counted once

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
        kept.append(sum(sizes.values()))
    print(kept)
    assert kept[1] < 0.5 * kept[0]
