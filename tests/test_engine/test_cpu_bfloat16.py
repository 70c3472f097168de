import torch
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

import mmela.engine.cpu_bfloat16  # noqa: F401  registers it


def test_steps_in_bfloat16_on_weights_of_float32():
    net = nn.Linear(4, 2)
    wrapper = OPTIM_WRAPPERS.build(
        dict(
            type='CPUBFloat16OptimWrapper',
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        )
    )
    before = net.weight.detach().clone()
    with wrapper.optim_context(net):
        out = net(torch.ones(3, 4))
    assert out.dtype == torch.bfloat16
    assert net(torch.ones(3, 4)).dtype == torch.float32  # the context has ended
    wrapper.update_params(out.float().sum())
    assert net.weight.dtype == torch.float32
    assert torch.allclose(net.weight, before - 0.3)
