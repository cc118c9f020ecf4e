import torch
from batches import batches, scaler  # yours; a torch.amp.GradScaler

from permask_core import FanInLinear, Rewiring, Topology

net = torch.nn.Sequential(FanInLinear(64, 256, fan_in=6), torch.nn.ReLU(),
                          FanInLinear(256, 10, fan_in=26))
optimizer = torch.optim.AdamW(net.parameters())
topology = Topology(net, None, Rewiring("srigl", every=10), steps=100)
for x, y in batches:
    scaler.scale(torch.nn.functional.cross_entropy(net(x), y)).backward()
    topology.step(optimizer, scaler)
    scaler.update()
    optimizer.zero_grad()
