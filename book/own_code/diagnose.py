from network import load_loader, load_net  # yours

from permask_core.evaluation.diagnosis import diagnose

net_a, net_b = load_net("a.pt"), load_net("b.pt")
print(diagnose(net_a, net_b, load_loader("test.pt")))
