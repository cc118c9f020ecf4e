"""The device of a process, and several processes that train one network, each on its share of every batch.

PyTorch's DistributedDataParallel averages the gradients. Processes are started here, so that the same call works in a
notebook and in a script, or they are those that ``torchrun`` started, on one machine or in a job of a cluster.
"""

import copy
import os
import socket
import sys
from contextlib import nullcontext

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel


def default_device():
    """The CUDA device of this process, if there is one, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


class Alone:
    """One process that trains by itself; what :class:`Joined` does with others is trivial here."""

    rank, ranks, device = 0, 1, None

    def wrap(self, model):
        """The network to call: its gradients become those of all processes."""
        return model

    def sum(self, tensor):
        """The sum of a tensor over the processes, in all of them."""
        return tensor

    def agree(self, yes):
        """Whether the first process says yes, in all of them."""
        return yes

    def accumulating(self, network, more):
        """The context of a backward pass after which ``more`` follow before the step."""
        return nullcontext()

    def of_first(self, function, *arguments):
        """What the first process gets from a function, in all of them."""
        return function(*arguments)

    def check_agreement(self, identity):
        """Raise ValueError, in every process, unless all have the same ``identity``."""


class Joined(Alone):
    """One of several processes under the names that ``torchrun`` has for them, connected for as long as they live."""

    def __init__(self, device_type):
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device(device_type, local if device_type == "cuda" else None)
        if device_type == "cuda":
            torch.cuda.set_device(self.device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()

    def wrap(self, model):
        return DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)

    def sum(self, tensor):
        distributed.all_reduce(tensor := tensor.clone())
        return tensor

    def agree(self, yes):
        return self.sum(torch.tensor(float(yes and self.rank == 0), device=self.device)).item() > 0

    def accumulating(self, network, more):
        return network.no_sync() if more else nullcontext()

    def of_first(self, function, *arguments):
        return of_first(function, *arguments)

    def check_agreement(self, identity):
        check_agreement(identity)


def launch(function, processes, device, model, *arguments):
    """Run ``function(joined, model, *arguments)`` in several processes: in new ones on this machine, or in those that
    ``torchrun`` started, of which this is one. What it returns is lost; ``joined`` is a :class:`Joined`. New processes
    have copies of the model, and share the memory of all other tensors.

    Raises
    ------
    ValueError
        If ``torchrun`` started another number of processes, or there are too few CUDA devices.
    RuntimeError
        If a process that was started failed, with the last line of its error.
    """
    device_type = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    started = distributed.is_torchelastic_launched()
    world, local = (int(os.environ[name]) if started else processes for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != processes:
        raise ValueError(f"processes is {processes}: expected {world}, the number that torchrun started")
    if device_type == "cuda" and local > torch.cuda.device_count():
        raise ValueError(f"processes is {local} on this machine: expected at most {torch.cuda.device_count()}, one for "
                         "each CUDA device")
    if started:
        return _join(device_type, function, model, *arguments)
    spawned = torch.multiprocessing.spawn(_start, (processes, _free_port(), device_type, function, model, *arguments),
                                          processes, join=False)
    try:
        while not spawned.join():
            pass
    except ProcessException as error:
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"a training process ended: {last}. A script must train in several processes below "
                           "`if __name__ == \"__main__\":`, because each imports it again, and a model's class must be "
                           "one that they can import") from error
    finally:
        for process in spawned.processes:  # after an interrupt, nobody would wait for them
            process.kill()
            process.join()


def _start(rank, processes, port, device_type, function, model, *arguments):
    """Be one of several processes, under the names that ``torchrun`` has for them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        _join(device_type, function, copy.deepcopy(model), *arguments)
        distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")  # torch would take the interrupt for a success


def _join(device_type, function, model, *arguments):
    function(Joined(device_type), model, *arguments)
    distributed.barrier()  # the first may still be writing


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def of_first(function, *arguments):
    """What ``function(*arguments)`` returns in the first of the processes that this one has joined, in all of them; so
    the others need not see the files that it reads. Where there are none, it is called here."""
    if not distributed.is_initialized():
        return function(*arguments)
    found = [function(*arguments) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return found[0]


def check_agreement(identity):
    """Raise ValueError, in every process, unless all have the same ``identity``: a dict, by what to call each value."""
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, identity)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise ValueError(f"rank {rank} disagrees about {name}: it has {other[name]!r}, rank 0 has {value!r}; "
                                 "expected the same in every process")
