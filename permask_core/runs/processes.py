"""Several processes that train one network, each on its share of every batch.

Lightning Fabric connects them and averages the gradients: of the engines that do so without taking over the training
loop it is the one that needs no launcher of its own, so that the same call works in a notebook, under ``torchrun`` and
in a job of a cluster. It is imported in the processes that train.
"""

import copy
import logging
import os
import socket
import sys

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

# It greets from every process that it starts; here, because they import this module before they begin.
for _name in ("distributed", "rank_zero"):
    logging.getLogger(f"lightning_fabric.utilities.{_name}").setLevel(logging.WARNING)


def default_device():
    """The CUDA device of this process, if there is one, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def launch(function, processes, device, model, *arguments):
    """Run ``function(fabric, model, *arguments)`` in several processes: in new ones on this machine, or in those that
    ``torchrun`` started, of which this is one. What it returns is lost; ``fabric`` is Lightning's. New processes have
    copies of the model, and share the memory of all other tensors.

    Raises
    ------
    ValueError
        If ``torchrun`` started another number of processes, or there are too few CUDA devices.
    RuntimeError
        If a process that was started failed, with the last line of its error.
    """
    accelerator = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    joined = distributed.is_torchelastic_launched()
    world, local = (int(os.environ[name]) if joined else processes for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != processes:
        raise ValueError(f"processes is {processes}: expected {world}, the number that torchrun started")
    if accelerator == "cuda" and local > torch.cuda.device_count():
        raise ValueError(f"processes is {local} on this machine: expected at most {torch.cuda.device_count()}, one for "
                         "each CUDA device")
    if joined:
        return _join(accelerator, function, model, *arguments)
    # Not by Fabric, which refuses to start processes from a notebook, and in a job of a cluster takes the job's
    # variables for those of its processes.
    started = torch.multiprocessing.spawn(_start, (processes, _free_port(), accelerator, function, model, *arguments),
                                          processes, join=False)
    try:
        while not started.join():
            pass
    except ProcessException as error:
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"a training process ended: {last}. A script must train in several processes below "
                           "`if __name__ == \"__main__\":`, because each imports it again, and a model's class must be "
                           "one that they can import") from error
    finally:
        for process in started.processes:  # after an interrupt, nobody would wait for them
            process.kill()
            process.join()


def _start(rank, processes, port, accelerator, function, model, *arguments):
    """Be one of several processes, under the names that ``torchrun`` has for them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        _join(accelerator, function, copy.deepcopy(model), *arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted")  # torch would take the interrupt for a success


def _join(accelerator, function, model, *arguments):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=world // local, strategy="ddp",
                    plugins=TorchElasticEnvironment())
    fabric.launch()
    function(fabric, model, *arguments)
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
