"""Opens what a command was asked for: a float network and this rank's share of its data, as a task."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import data
import torch
from language_model import ASSETS, WEIGHTS, encode, load_model, read_words, streams
from networks import Network, load_network
from ranks import Ranks
from tasks import Classification, LanguageModelling
from torch.utils.data import Dataset

IMAGES = {"imagenet": "ImageNet", "cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
TEXTS = {"wikitext-2": "WikiText-2", "bible": "the King James Bible"}
CALIBRATION_BATCH = 32  # small, so that several ranks share 512 images


def open_images(args: argparse.Namespace, name: str, ranks: Ranks) -> Classification:
    """A network on test images, with training images for the statistics of its layers' inputs."""
    if args.data is None and args.dataset != "fashion-mnist":
        raise data.DataError(
            f"--data is missing: the folder of {args.dataset} in its official layout; or --dataset fashion-mnist"
        )
    network = load_network(name, args.dataset, args.weight)
    stated = {key: tuple(value) for key in ("mean", "std") if (value := getattr(args, key))}
    preset = dataclasses.replace(network.preset, **stated)
    test = open_split(args, network, "test")
    chosen = data.pick(len(test), args.limit)
    common: dict[str, Any] = {"workers": args.workers, "memory": int(args.memory * 1e9)}
    batches = data.Batches(test, chosen, args.batch_size, **common)
    calibration, calibrated = None, 0
    if calibrated := getattr(args, "calibration", 0):
        train = open_split(args, network, "train")
        picked = data.pick_random(len(train), calibrated, args.seed)
        calibration = data.Batches(train, picked, CALIBRATION_BATCH, **common).share(ranks.rank, ranks.world)
    where = str(args.data.resolve()) if args.data else "bundled"
    identity = [
        network.identity,
        args.dataset,
        where,
        len(chosen),
        args.batch_size,
        calibrated,
        args.seed,
        preset.mean,
        preset.std,
    ]
    return Classification(
        network.name,
        f"{len(chosen):,} images of {IMAGES[args.dataset]}",
        [*identity, ranks.device.type, *stated.values()],
        network.model.to(ranks.device).to(memory_format=torch.channels_last),
        batches.share(ranks.rank, ranks.world),
        calibration,
        functools.partial(data.normalize, preset=preset),
    )


def open_split(args: argparse.Namespace, network: Network, split: str) -> Dataset:
    """Test or training images, prepared for this network."""
    if args.dataset == "fashion-mnist":
        return data.fashion_mnist({"test": "t10k", "train": "calibration"}[split])
    if args.dataset == "cifar10":
        return data.cifar10(args.data, split)
    return data.imagenet(args.data, {"test": "val"}.get(split, split), network.preset)


def open_text(args: argparse.Namespace, name: str, ranks: Ranks) -> LanguageModelling:
    """A language model on test text, in groups of streams."""
    bundled = args.dataset == "bible"
    folder, weights = args.data or (ASSETS if bundled else None), args.weight or (WEIGHTS if bundled else None)
    if folder is None or weights is None:
        raise data.DataError(
            f"{args.dataset} needs --data, the folder with wiki.test.tokens, and --weights, a file of "
            "examples/train_language_model.py; --dataset bible needs neither"
        )
    try:
        words = read_words(folder, "test")[: args.limit]
        model, vocabulary = load_model(weights)
        text = streams(encode(words, vocabulary), args.streams)
    except (OSError, ValueError) as error:
        raise data.DataError(str(error)) from None
    groups = list(text.split(args.batch_size, dim=1))[ranks.rank :: ranks.world]
    where = str(Path(folder).resolve()) if args.data else "bundled"
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    config = model.config
    return LanguageModelling(
        f"{name}-{config['hidden']}",
        f"{len(words):,} words of {TEXTS[args.dataset]}, {config['layers']} layers of {config['hidden']} units, "
        f"vocabulary {config['words']:,}",
        [digest, args.dataset, where, len(words), args.streams, args.batch_size, ranks.device.type],
        model.to(ranks.device),
        groups,
    )
