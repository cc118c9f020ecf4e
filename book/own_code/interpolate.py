from network import load_loader, load_net  # yours

from permask_core import align
from permask_core.evaluation.connectivity import barrier, line

net_a, net_b = load_net("a.pt"), load_net("b.pt")
train, test = load_loader("train.pt"), load_loader("test.pt")
aligned = align(net_a, net_b, train, by="activations").model
for name, source in (("as they are", net_a), ("aligned", aligned)):
    found = line(net_a, source.state_dict(), net_b.state_dict(), test,
                 correction="reset", batches=train)
    print(f"{name}: a barrier of {barrier(found.alphas, found.losses):.3f}")
