"""What the tests of measurements on plain and residual networks share."""

from contextlib import contextmanager

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def images(net, *sizes):
    """Batches of so many 8x8 images, in the network's precision."""
    random = torch.Generator().manual_seed(2)
    dtype = next(net.parameters()).dtype
    batches = [(torch.randn(n, 3, 8, 8, generator=random), torch.randint(10, (n,), generator=random)) for n in sizes]
    return [(x.to(dtype), y) for x, y in batches]


@contextmanager
def untouched(net):
    """Bit for bit: weights and buffers, modes, attributes, hooks, gradients, and the random numbers to come."""

    def look():
        modules = list(net.modules())
        keys = [(m.training, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
        tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters()), torch.get_rng_state()]
        return keys, [p.requires_grad for p in net.parameters()], [t.clone() for t in tensors]

    random = torch.Generator().manual_seed(9)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=random).to(p)
    keys, requires, tensors = look()
    yield
    assert (keys, requires) == look()[:2]
    assert all(torch.equal(a, b) for a, b in zip(tensors, look()[2], strict=True))
