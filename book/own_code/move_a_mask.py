import torch
from network import Net  # yours

from permask_core import align, apply_masks, masks_of, permute

net_a, net_b = Net(), Net()
net_a.load_state_dict(torch.load("pruned_a.pt", weights_only=True))
net_b.load_state_dict(torch.load("b.pt", weights_only=True))
found = align(net_a, net_b, torch.load("inputs.pt", weights_only=True))
masks = permute(found.groups, found.permutations, masks_of(net_a))
torch.save(apply_masks(net_b, masks).state_dict(), "masked_b.pt")
