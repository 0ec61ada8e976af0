"""Opens what a command was asked for: a float network and this rank's share of its data, as a task."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import data
import torch
from language_model import ASSETS, DECODER_WEIGHTS, WEIGHTS, encode, load_model, read_words, streams
from networks import Network, load_network
from options import TEXTS
from ranks import Ranks
from tasks import Classification, LanguageModelling
from torch.utils.data import Dataset

BUNDLED_TEXT = {"lstm": WEIGHTS, "decoder": DECODER_WEIGHTS}
CALIBRATION_BATCH = 32  # small, so that several ranks share 512 images


def open_images(args: argparse.Namespace, name: str, weights: str | None, ranks: Ranks) -> Classification:
    """A network on test images, with training images for the statistics of its layers' inputs."""
    _check_folder(args)
    network = load_network(name, args.dataset, weights)
    preset = _stated_preset(args, network.preset)
    common: dict[str, Any] = {"workers": args.workers, "memory": int(args.memory * 1e9)}
    test = open_split(args, network, "test")
    chosen = data.pick(len(test), args.limit)
    batches = data.Batches(test, chosen, args.batch_size, **common).share(ranks.rank, ranks.world)
    calibration, calibrated = None, getattr(args, "calibration", 0)
    if calibrated:
        train = open_split(args, network, "train")
        picked = data.pick_random(len(train), calibrated, args.seed)
        calibration = data.Batches(train, picked, CALIBRATION_BATCH, **common).share(ranks.rank, ranks.world)
    where = str(args.data.resolve()) if args.data else "bundled"
    setting = [args.dataset, where, len(chosen), args.batch_size, calibrated, args.seed, ranks.device.type]
    return Classification(
        network.name,
        f"{len(chosen):,} images of {data.NAMES[args.dataset]}",
        [network.name, network.identity, *dataclasses.astuple(preset), *setting],
        network.model.to(ranks.device).to(memory_format=torch.channels_last),
        batches,
        calibration,
        functools.partial(data.normalize, preset=preset),
        (len(preset.mean), preset.crop, preset.crop),
    )


def _check_folder(args: argparse.Namespace) -> None:
    bundled = args.dataset == "fashion-mnist"
    if args.data is None and not bundled:
        raise data.DataError(
            f"--data is missing: the folder of {args.dataset} in its official layout; or --dataset fashion-mnist"
        )
    if bundled and (args.mean or args.std):
        raise data.DataError("--dataset fashion-mnist is normalized: leave out --mean and --std")


def _stated_preset(args: argparse.Namespace, preset: data.Preset) -> data.Preset:
    """With the mean and standard deviation that were stated."""
    stated = {key: tuple(value) for key in ("mean", "std") if (value := getattr(args, key))}
    for key, value in stated.items():
        if len(value) != len(preset.mean) or (key == "std" and min(value) <= 0):
            raise data.DataError(f"--{key} {value}: {len(preset.mean)} numbers are needed, for std above 0")
    return dataclasses.replace(preset, **stated)


def open_split(args: argparse.Namespace, network: Network, split: str) -> Dataset:
    """Test or training images, prepared for this network."""
    if args.dataset == "fashion-mnist":
        if split == "train" and args.data:
            return data.fashion_mnist("train", args.data)
        return data.fashion_mnist({"test": "t10k", "train": "calibration"}[split])
    if args.dataset == "cifar10":
        return data.cifar10(args.data, split)
    return data.imagenet(args.data, {"test": "val"}.get(split, split), network.preset)


def open_text(args: argparse.Namespace, name: str, weights: str | None, ranks: Ranks) -> LanguageModelling:
    """A language model on test text, in groups of streams."""
    bundled = args.dataset == "bible"
    if bundled and not weights and name.lower() not in BUNDLED_TEXT:
        raise data.DataError(f"no network {name!r} for the bundled text, only LSTM and decoder; give its --weights")
    folder = args.data or (ASSETS if bundled else None)
    weights = weights or (BUNDLED_TEXT[name.lower()] if bundled else None)
    if folder is None or weights is None:
        raise data.DataError(
            f"{args.dataset} needs --data, the folder with wiki.test.tokens, and --weights, a file of "
            "examples/train_language_model.py; --dataset bible needs neither"
        )
    try:
        all_words = read_words(folder, "test")
        words, calibrated = all_words[: args.limit], getattr(args, "calibration", 0)
        model, vocabulary = load_model(weights)
        text = streams(encode(words, vocabulary), args.streams)
        shown = _text_that_calibrates(all_words[len(words) :], calibrated, vocabulary, args.streams)
    except (OSError, ValueError) as error:
        raise data.DataError(str(error)) from None
    size = min(args.batch_size, math.ceil(args.streams / ranks.world))  # something for each rank
    groups = list(text.split(size, dim=1))[ranks.rank :: ranks.world]
    where = str(Path(folder).resolve()) if args.data else "bundled"
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    config = model.config
    units = config["width" if "width" in config else "hidden"]
    papers = (units, config["layers"], config["words"]) == (650, 2, 33278)
    return LanguageModelling(
        name if papers else f"{name}-{units}",
        f"{len(words):,} words of {TEXTS[args.dataset]}, {config['layers']} layers of {units} units, "
        f"vocabulary {config['words']:,}",
        [digest, args.dataset, where, len(words), args.streams, args.batch_size, calibrated, ranks.device.type],
        model.to(ranks.device),
        groups,
        shown,
    )


def _text_that_calibrates(rest: list[str], count: int, vocabulary: list[str], width: int) -> torch.Tensor | None:
    """The last words of the test text, none of which are scored."""
    if not count:
        return None
    if len(rest) < count:
        raise ValueError(f"--calibration {count}: {len(rest)} words are left beside those scored; give a lower --limit")
    return streams(encode(rest[-count:], vocabulary), width)
