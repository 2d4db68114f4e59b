"""FastUnet against upstream's Unet; checkpointing; unsupported upstream versions."""

import denoising_diffusion_pytorch.denoising_diffusion_pytorch as upstream
import pytest
import torch
from torch import nn

from engine import unet
from engine.errors import UserError
from engine.unet import FastUnet
from tests.helpers import (
    ROOT,
    UNET_ARCHITECTURES,
    needs_no_gpu,
    outputs_and_gradients,
    relative_error,
    unet_pair,
)


@pytest.mark.parametrize("architecture", UNET_ARCHITECTURES)
def test_fast_unet_matches_upstream(architecture):
    reference, fast = unet_pair(**architecture)
    assert list(reference.state_dict()) == list(fast.state_dict())
    for a, b in zip(outputs_and_gradients(fast), outputs_and_gradients(reference), strict=True):
        assert relative_error(a, b) < 1e-5


def test_fast_unet_broadcasts_one_timestep_and_one_label(monkeypatch):
    torch.manual_seed(0)
    network = FastUnet(dim=8, dim_mults=(1, 2), num_classes=3)
    nn.init.normal_(network.class_embedding.weight)
    rows = []

    def spy(x, skip, module, weights, modulation, mask):  # kernels read a row for each image
        rows.append(len(modulation))
        return resnet_block(x, skip, module, weights, modulation, mask)

    resnet_block = unet.resnet_block
    monkeypatch.setattr(unet, "resnet_block", spy)
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([400]), torch.tensor([2])
    with torch.no_grad():
        output = network(x, t, labels=labels)
        torch.testing.assert_close(output, network(x, t.repeat(3), labels=labels.repeat(3)))
    assert set(rows) == {3}


def test_fast_unet_in_bf16_takes_labels():
    torch.manual_seed(0)
    network = FastUnet(dim=8, dim_mults=(1, 2), num_classes=3)
    nn.init.normal_(network.class_embedding.weight)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999])
    for labels in (torch.tensor([2, -1, 0]), torch.rand(3, 3)):
        with torch.no_grad():
            exact = network.float()(x, t, labels=labels)
            output = network.bfloat16()(x.bfloat16(), t, labels=labels)
        assert relative_error(output, exact) < 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_fast_unet_computes_with_the_weights_and_modules_of_now(autocast):
    _, expected = unet_pair(**UNET_ARCHITECTURES[0])
    state = expected.state_dict()
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 400, 999])

    def assigned():
        network = FastUnet(**UNET_ARCHITECTURES[0])
        network.load_state_dict(state, assign=True)
        return network

    def from_meta():
        with torch.device("meta"):
            network = FastUnet(**UNET_ARCHITECTURES[0])
        network = network.to_empty(device="cpu")
        network.upsample_matrix.copy_(expected.upsample_matrix)
        network.load_state_dict(state)
        return network

    def with_replaced_modules():
        network = FastUnet(**UNET_ARCHITECTURES[0])
        network.mid_block1 = FastUnet(**UNET_ARCHITECTURES[0]).mid_block1
        network.final_conv = nn.Conv2d(32, 3, 1)
        network.load_state_dict(state)
        return network

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = expected(x, t)
        for make in (assigned, from_meta, with_replaced_modules):
            torch.testing.assert_close(make()(x, t), output)
        network = FastUnet(**UNET_ARCHITECTURES[0])
        torch.testing.assert_close(torch.func.functional_call(network, state, (x, t)), output)


def test_class_embedding_begins_at_zero_and_is_the_only_new_key():
    torch.manual_seed(0)
    plain = FastUnet(**UNET_ARCHITECTURES[0])
    torch.manual_seed(0)
    conditional = FastUnet(**UNET_ARCHITECTURES[0], num_classes=3)
    new = conditional.state_dict().keys() - plain.state_dict().keys()
    assert new == {"class_embedding.weight"}
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 400, 999])
    labels = torch.tensor([2, -1, 0])
    with torch.no_grad():
        expected = plain(x, t)
        assert torch.equal(conditional(x, t, labels=labels), expected)
        conditional.class_embedding.weight.normal_()
        output = conditional(x, t, labels=labels)
        assert torch.equal(conditional(x, t), expected)
        weights = torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]])
        assert torch.equal(conditional(x, t, labels=weights), output)
    is_same = [torch.allclose(a, b, atol=1e-3) for a, b in zip(output, expected, strict=True)]
    assert is_same == [False, True, False]


def test_fast_unet_in_mixed_precision_is_as_exact_as_upstream():
    reference, fast = unet_pair(**UNET_ARCHITECTURES[0])
    exact = outputs_and_gradients(reference)
    for network in (reference, fast):
        network.zero_grad()
    expected = outputs_and_gradients(reference, autocast=True)
    found = outputs_and_gradients(fast, autocast=True)
    for a, b, c in zip(found, expected, exact, strict=True):
        assert relative_error(a, c) < 1.5 * relative_error(b, c) < 0.05


def test_fast_unet_compiled_in_mixed_precision_has_all_gradients():
    _, fast = unet_pair(**UNET_ARCHITECTURES[1])
    plain = outputs_and_gradients(fast, autocast=True)
    fast.zero_grad()
    # This backend runs what Dynamo traces and needs no C++ compiler.
    compiled = torch.compile(fast, backend="eager", dynamic=False)
    for a, b in zip(outputs_and_gradients(compiled, autocast=True), plain, strict=True):
        assert relative_error(a, b) < 1e-3


# Gradient checkpointing.


def checkpointed_pair(**architecture) -> tuple[FastUnet, FastUnet]:
    """The same network without and with checkpointing."""
    networks = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        networks.append(FastUnet(**{"dim": 16, "dim_mults": (1, 2, 2), **architecture}).train())
        networks[-1].checkpointing = checkpointing
    return tuple(networks)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient(dropout, autocast):
    found = []
    for network in checkpointed_pair(dropout=dropout):
        torch.manual_seed(5)  # for dropout
        found.append(outputs_and_gradients(network, autocast))
    for plain, checkpointed in zip(*found, strict=True):
        limit = 1e-2 if autocast and dropout else 1e-6
        assert relative_error(checkpointed, plain) < limit


@needs_no_gpu
def test_checkpointing_with_kernels_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(unet, "use_triton", lambda x: True)
    found = []
    for network in checkpointed_pair(dropout=0.3, dim_mults=(1,), attn_heads=1, attn_dim_head=16):
        torch.manual_seed(5)
        found.append(outputs_and_gradients(network, size=4))
    for plain, checkpointed in zip(*found, strict=True):
        assert relative_error(checkpointed, plain) < 1e-6


def test_checkpointing_saves_memory():
    saved_bytes = []
    for network in checkpointed_pair():
        sizes: dict[int, int] = {}  # bytes by storage, each counted once

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
        saved_bytes.append(sum(sizes.values()))
    assert saved_bytes[1] < 0.2 * saved_bytes[0]


# Other versions of upstream.


class GatedBlock(upstream.Block):
    """A block with one more module than FastUnet computes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Identity()


def pooled_downsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """A Downsample whose weights have other shapes."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(dim, dim_out or dim, 1))


@pytest.mark.parametrize(
    ("name", "replacement", "found"),
    [("Block", GatedBlock, "proj norm act dropout gate"),
     ("Downsample", pooled_downsample, "AvgPool2d Conv2d")],
)  # fmt: skip
def test_fast_unet_rejects_an_unknown_upstream(name, replacement, found, monkeypatch):
    monkeypatch.setattr(upstream, name, replacement)
    with pytest.raises(UserError) as caught:
        FastUnet(dim=8, dim_mults=(1, 2))
    message = str(caught.value)
    assert found in message and unet.UPSTREAM_VERSIONS in message and "\n" not in message


def test_requirements_name_the_supported_upstream():
    assert unet.UPSTREAM_VERSIONS in (ROOT / "requirements.txt").read_text().splitlines()
