"""How many generated images of a class a small classifier recognises as of that class, beside real images held back from it.

    python benchmarks/class_recognition.py --data ./images runs/conditional runs/unconditional

Images of a run that has learned classes are drawn by these, of another by Gaussians of its encodings (generate.py --class).
The classifier learns from three of five real images of each class, at the size of the first run; the others are held back.
"""
import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpointing import load_generator, preparation_of  # noqa: E402
from class_gaussians import class_gaussians, learned_classes  # noqa: E402
from image_data import class_labels, load_images  # noqa: E402
from randomness import latent_noise, random_generator  # noqa: E402

EPOCHS = 30
BATCH = 64
LEARNING_RATE = 2e-3
LARGEST = 5  # classes that the last line is about


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--num-images", type=int, default=200, help="generated of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", default="cache")
    options = parser.parse_args()
    vaes = [load_generator(run) for run in options.runs]
    data = load_images(options.data, vaes[0].image_shape[1:], cache_dir=options.cache_dir, skip_bad=True,
                       **preparation_of(vaes[0]))
    names, labels = class_labels(data)
    place = torch.empty_like(labels)
    for label in range(len(names)):
        place[labels == label] = torch.arange((labels == label).sum().item())
    held = place % 5 >= 3
    classifier = trained(data.images[~held], labels[~held], len(names), options.seed)
    columns = {"real": recalls(classifier, data.images[held] / 255, labels[held], len(names))}
    z = latent_noise(options.seed, range(options.num_images), vaes[0].latent_dim)
    for run, vae in zip(options.runs, vaes, strict=True):
        classes = (learned_classes(vae, ["all"]) if vae.class_names
                   else class_gaussians(vae, data, ["all"], report=lambda line: None))
        images = torch.cat([decoded(vae, one.draw(z)) for one in tqdm(classes, desc=str(run), disable=None)])
        generated = torch.tensor([names.index(one.name) for one in classes]).repeat_interleave(len(z))
        columns[pathlib.Path(run).name] = recalls(classifier, images, generated, len(names))
    counts = labels.bincount(minlength=len(names))
    width = max(12, *map(len, names))
    print(f"{'':{width}} {'images':>8}" + "".join(f"{name:>16}" for name in columns))
    for label in counts.argsort(descending=True).tolist():
        shares = "".join(f"{column[label]:>16.2f}" for column in columns.values())
        print(f"{names[label]:{width}} {counts[label]:>8}{shares}")
    largest = counts.argsort(descending=True)[:LARGEST]
    print(f"{f'largest {len(largest)}':{width}} {'':>8}" + "".join(
        f"{column[largest].mean():>16.2f}" for column in columns.values()))


def trained(images, labels, num_classes, seed):
    """Returns a classifier of images (N, C, H, W) in [0, 1], trained on uint8 images with mirroring and shifts."""
    torch.manual_seed(seed)
    layers, channels = [], images.shape[1]
    for width in (32, 64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, num_classes)]
    classifier = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps_per_epoch = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch)
    for epoch in tqdm(range(EPOCHS), desc="classifier", disable=None):
        order = torch.randperm(len(images), generator=random_generator(seed, "classifier", epoch))
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(classifier(shifted(images[batch] / 255)), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def shifted(images):
    """Returns images mirrored, each with probability a half, and all moved by up to a 16th of their size."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    height, width = images.shape[2:]
    edge = max(1, height // 16)
    top, left = torch.randint(2 * edge + 1, (2,)).tolist()
    return F.pad(mirrored, (edge,) * 4, mode="replicate")[:, :, top:top + height, left:left + width]


@torch.no_grad()
def recalls(classifier, images, labels, num_classes):
    """Returns for each class the share of its images that are recognised, (K,)."""
    found = torch.cat([classifier(part).argmax(dim=1) for part in images.split(BATCH)])
    return torch.stack([(found == labels)[labels == label].float().mean() for label in range(num_classes)])


@torch.no_grad()
def decoded(vae, z):
    return torch.cat([vae.decode(part) for part in z.split(BATCH)])


if __name__ == "__main__":
    main()
