"""What the tests of measurements on plain and residual networks share."""

from contextlib import contextmanager

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def moved(make, by, seed, dtype=torch.float32):
    """What `make` draws, then moved by N(0, by^2); in training mode but for one of its stages."""
    torch.manual_seed(seed)
    net = make().to(dtype).train()
    for p in net.parameters():
        p.data += by * torch.randn_like(p)
    net.stages[1].eval()
    return net


def images(net, *sizes, side=8):
    """Batches of so many images, in the network's precision."""
    random = torch.Generator().manual_seed(2)
    dtype = next(net.parameters()).dtype
    x, y = torch.randn(sum(sizes), 3, side, side, generator=random), torch.randint(10, (sum(sizes),), generator=random)
    return list(zip(x.to(dtype).split(sizes), y.split(sizes), strict=True))


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
