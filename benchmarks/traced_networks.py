"""The permutation groups of the networks that people use: what is found, how long it takes, and a test of the function.

All classification, segmentation and detection models of torchvision; one small model of each family in timm; tiny
configurations of the architectures of transformers; and U-Nets as in diffusers. No network has trained weights. Each is
traced. Then a copy in float64 with random parameters and buffers (permask_core.matching.draw_stable_weights) is run
before and after a random permutation of all groups. For as many groups as the time allows, one entry is omitted, which
must change the outputs. Results are written to permask_core/data/measured/traced_networks.json network by network, each
with its commit. An interrupted run continues with the next network; delete a row to measure it again. With other
versions all networks are measured again. Run it with `python benchmarks/traced_networks.py`. It takes a few hours on
one core, and 16 GB of memory for the largest model of torchvision; `--libraries` and `--names` choose some networks.
"""

import argparse
import gc
import json
import re
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from _diffusion import UNet
from _machine import written
from _tiny_transformers import ARCHITECTURES

import permask_core
from permask_core.matching import derangements, draw_stable_weights, function_change, permutation_groups
from permask_core.models.vision import torchvision
from permask_core.runs.progress import progress
from permask_core.runs.store import commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "traced_networks.json"
SIDE = 64  # of images, pixels
SIDES = {"inception_v3": 96, **dict.fromkeys(("maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"),
                                             224)}  # of torchvision's models that do not accept smaller ones
TIMM = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto cpubone_nano
    crossvit_tiny_240 cs3darknet_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c
    dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
    legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mobilenetv2_035
    mobilenetv3_small_050 mobilenetv4_conv_small_035 mobileone_s0 mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_gap nest_tiny nextvit_small nf_resnet26 pit_ti_224 poolformer_s12 pvt_v2_b0
    rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnetv2_18
    rexnetr_100 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny vit_relpos_small_patch16_224
    vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()  # a small model of each family
DENSE = {"segmentation": torchvision.models.segmentation, "detection": torchvision.models.detection}


def images(side, *more):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)), *more


def of_torchvision(name, part=None):
    """Return a model of torchvision without weights, an input for it, and the side of the image."""
    options = {"weights_backbone": None} if part else {}
    side = SIDES.get(name, SIDE)
    (image,) = images(side)
    return (torchvision.models.get_model(name, weights=None, **options), ([image[0]],) if part == "detection"
            else (image,), side)


def of_timm(name):
    """Return a model of timm, an input for it, and its side: the default one if the model accepts no smaller image."""
    import timm

    model, side = timm.create_model(name), SIDE
    try:
        with torch.no_grad():
            timm.create_model(name).eval()(*images(side))
    except (RuntimeError, AssertionError, ValueError, IndexError):
        side = model.default_cfg["input_size"][-1]
    return model, images(side), side


def of_transformers(name):
    model, inputs = ARCHITECTURES[name]()
    return model, inputs, None


def networks():
    """Return by library and name a function that builds a network."""
    return {
        "torchvision": {name: partial(of_torchvision, name, part) for part, module in {
            None: torchvision.models, **DENSE}.items() for name in torchvision.models.list_models(module=module)},
        "timm": {name: partial(of_timm, name) for name in TIMM},
        "transformers": {name: partial(of_transformers, name) for name in ARCHITECTURES},
        "as in diffusers": {
            "UNet2DModel": lambda: (UNet([32, 64, 64], [False, True, True]), images(16, torch.tensor([3.0])), 16),
            "UNet2DConditionModel": lambda: (
                UNet([32, 64], [True, True], context=24),
                images(16, torch.tensor([3.0]), torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))), 16),
        }}


def logits(result):
    """Return the part of a model's result that permutations must preserve: what it predicts, if that has a name."""
    if isinstance(result, dict):
        for name in ("logits", "logits_per_image", "out"):
            if name in result:
                return result[name]
    return result


def measured(build, seconds):
    """Return what is measured of a network; ``seconds`` is the time for omitting entries."""
    model, example, side = build()
    row = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "side": side}
    start = time.process_time()
    try:
        groups = permutation_groups(model, example, outputs=logits)
    except ValueError as error:
        return row | {"seconds": time.process_time() - start, "refused": reason(error)}
    row["seconds"] = time.process_time() - start
    fixed = Counter()
    for _, _, count, why in groups.fixed:
        fixed[why] += count
    row |= {"groups": len(groups), "top": sum(group.within is None for group in groups.values()),
            "units": sum(group.size for group in groups.values()), "fixed": fixed}
    if not groups:
        return row
    example = torch.utils._pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point()
                                           else t, example)
    try:
        model = draw_stable_weights(model, example, outputs=logits)
        gc.collect()
        permutations = derangements(groups)
        row["change"] = function_change(groups, permutations, model, example, outputs=logits)
    except ValueError as error:
        return row | {"unchecked": reason(error)}
    left_out, start = {}, time.process_time()
    for group in spread(list(groups)):
        if left_out and time.process_time() - start > seconds:
            break
        part = {**groups, group: without_first(groups[group], model)}
        left_out[group] = function_change(part, {group: permutations[group]}, model, example, outputs=logits)
    return row | {"left_out": min(left_out.values()), "left_out_at": min(left_out, key=left_out.get),
                  "left_out_groups": len(left_out)}


def without_first(group, model):
    """Return a group without the first of its entries, under all names of the tensor."""
    state = model.state_dict(keep_vars=True)
    first = group.entries[0]
    return group._replace(entries=tuple(e for e in group.entries if state[e.tensor] is not state[first.tensor]
                                        or (e.axis, e.rows) != (first.axis, first.rows)))


def reason(error):
    """Return the message of an error without the folders of this machine."""
    return re.sub(r"/\S*/", "", str(error).partition(". Its groups can be written by hand")[0])


def spread(names):
    """Return the names in an order of which every beginning is spread over the network (a van der Corput sequence)."""
    bits = max(1, (len(names) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [names[i] for i in order if i < len(names)]


def main(argv=None):
    every = networks()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libraries", nargs="+", default=list(every), choices=list(every), help="default: all")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=1, help="for omitting entries in each network")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    chosen = {(library, name): build for library in options.libraries for name, build in every[library].items()
              if options.names is None or name in options.names}
    if options.names and (unknown := set(options.names) - {name for _, name in chosen}):
        parser.error(f"no network has the name {min(unknown)!r}")
    torch.set_num_threads(1)
    record = {"command": f"python benchmarks/traced_networks.py --seconds {options.seconds:g}", "versions": versions(),
              "device": device_name("cpu"), "precision": "float64", "rows": []}
    if options.result.exists() and (old := json.loads(options.result.read_text()))["versions"] == record["versions"]:
        record["rows"] = old["rows"]
    done = {(row["library"], row["model"]) for row in record["rows"]}
    order = {key: i for i, key in enumerate((library, name) for library in every for name in every[library])}
    for library, name in progress([key for key in chosen if key not in done], "networks"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                row = {"library": library, "model": name} | measured(chosen[library, name], options.seconds)
            except Exception:  # of a network; the others are measured
                traceback.print_exc()
                continue
        print({key: value for key, value in row.items() if key != "library"}, flush=True)
        rows = [*record["rows"], row | {"commit": commit()}]
        record["rows"] = sorted(rows, key=lambda row: order.get((row["library"], row["model"]), len(order)))
        written(options.result, record)
        gc.collect()


if __name__ == "__main__":
    main()
