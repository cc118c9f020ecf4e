"""The device of a process, and several processes that train one network, each on its part of every batch.

PyTorch's DistributedDataParallel averages the gradients. The processes are started here, so that the same call works in
a notebook and in a script, or were started by ``torchrun``, on one machine or in a cluster job.
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
    """Return the CUDA device of this process if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


class Alone:
    """A single training process; the methods that communicate in :class:`Joined` are trivial here."""

    rank, ranks, device = 0, 1, None

    def wrap(self, model):
        """Return the network to call; its gradients are averaged over all processes."""
        return model

    def sum(self, tensor):
        """Return the sum of a tensor over all processes, in every process."""
        return tensor

    def agree(self, yes):
        """Return the first process's ``yes`` in every process."""
        return yes

    def accumulating(self, network, more):
        """Return the context of a backward pass; ``more`` says whether others follow before the step."""
        return nullcontext()

    def of_first(self, function, *arguments):
        """Call a function in the first process, and return its result in every process."""
        return function(*arguments)

    def check_agreement(self, identity):
        """Raise ValueError in every process unless all have the same ``identity``."""


class Joined(Alone):
    """One of several connected processes, which reads its rank from the environment variables of ``torchrun``; its
    methods are those of :class:`Alone`."""

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
    """Run ``function(joined, model, *arguments)`` in several processes, where ``joined`` is a :class:`Joined`.

    The processes are new ones on this machine, or those that ``torchrun`` started, of which this is one. New processes
    copy the model and share the memory of all other tensors. The return value of ``function`` is discarded.

    Raises
    ------
    ValueError
        If ``torchrun`` started a different number of processes, or there are too few CUDA devices.
    RuntimeError
        If a process failed; the message has the last line of its error.
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
        raise RuntimeError(f"a training process failed: {last}. A script must start several processes below "
                           "`if __name__ == \"__main__\":`, because each process imports the script again, and must be "
                           "able to import the model's class") from error
    finally:
        for process in spawned.processes:  # after an interrupt, no one would wait for them
            process.kill()
            process.join()


def _start(rank, processes, port, device_type, function, model, *arguments):
    """Run as one of several processes, with the environment variables that ``torchrun`` sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        _join(device_type, function, copy.deepcopy(model), *arguments)
        distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")  # torch would count an interrupt as success


def _join(device_type, function, model, *arguments):
    function(Joined(device_type), model, *arguments)
    distributed.barrier()  # the first process may still be writing


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def of_first(function, *arguments):
    """Call ``function(*arguments)`` in the first of the connected processes, and return its result in every process.

    Only the first process needs access to the files that the function reads. Without connected processes, the function
    is called in this one.
    """
    if not distributed.is_initialized():
        return function(*arguments)
    found = [function(*arguments) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(found)
    return found[0]


def check_agreement(identity):
    """Raise ValueError in every process unless all have the same ``identity``, a dict of names and values."""
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, identity)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise ValueError(f"rank {rank} disagrees about {name}: it has {other[name]!r}, rank 0 has {value!r}; "
                                 "expected the same in every process")
