"""Several processes that train one network, each on its share of every batch.

Lightning Fabric starts or joins them and averages the gradients: of the engines that do so without taking over the
training loop it is the one that needs no launcher of its own, so that the same call works in a notebook, under
``torchrun`` and in a job of a cluster. It is imported when it is asked for.
"""

import logging
import os
import warnings
from functools import partial

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

# It greets from every process that it starts; here, because they import this module before they begin.
for _name in ("distributed", "rank_zero"):
    logging.getLogger(f"lightning_fabric.utilities.{_name}").setLevel(logging.WARNING)


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
    from lightning_fabric import Fabric

    accelerator = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    joined = distributed.is_torchelastic_launched()
    world, local = (int(os.environ[name]) if joined else processes for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != processes:
        raise ValueError(f"processes is {processes}: expected {world}, the number that torchrun started")
    if accelerator == "cuda" and local > torch.cuda.device_count():
        raise ValueError(f"processes is {local} on this machine: expected at most {torch.cuda.device_count()}, one for "
                         "each CUDA device")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=world // local,
                        strategy="ddp" if joined else "ddp_spawn")
        # Bound, because Fabric would take the arguments apart in search of modules, whose memory it unshares.
        try:
            fabric.launch(_run, model, partial(_call, function, arguments))
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"a training process ended: {last}. A script must train in several processes below "
                               "`if __name__ == \"__main__\":`, because each imports it again") from error


def _call(function, arguments, fabric, model):
    function(fabric, model, *arguments)


def _run(fabric, model, call):
    call(fabric, model)
    distributed.barrier()  # the first may still be writing


def check_agreement(identity):
    """Raise ValueError, in every process, unless all have the same ``identity``: a dict, by what to call each value."""
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, identity)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise ValueError(f"rank {rank} disagrees about {name}: it has {other[name]!r}, rank 0 has {value!r}; "
                                 "expected the same in every process")
