"""How often an independent classifier finds the requested class in images of the digits run.

    pip install -e '.[test]'
    python benchmarks/digits_quality.py --ckpt runs/digits

The classifier is scikit-learn's support vector machine, trained on four fifths of the real digits; its accuracy on
the held-out fifth is printed beside. Pictures are drawn by sample.py, in turn for the ten classes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="sets of n images, each of its own seed")
    args, sample_flags = parser.parse_known_args()

    real = np.load(str(files("diffusion.data") / "digits.npz"))
    pixels = real["images"].reshape(-1, 64) / 255
    train_x, test_x, train_y, test_y = train_test_split(pixels, real["labels"], test_size=0.2, random_state=0)
    classifier = SVC(gamma=0.02 * 64 / 10, C=10).fit(train_x, train_y)
    print(f"classifier on held-out real digits: {classifier.score(test_x, test_y):.1%} of {len(test_y)}")
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "samples.npz"
            command = [sys.executable, "sample.py", "--ckpt", args.ckpt, "--npz", "--out", str(out)]
            flags = ["--n", str(args.n), "--seed", str(seed), *sample_flags]
            subprocess.run([*command, *flags], check=True, capture_output=True, cwd=Path(__file__).parents[1])
            drawn = np.load(out)
        found = classifier.predict(drawn["arr_0"].reshape(args.n, 64) / 255)
        right = found == drawn["arr_1"]
        by_class = " ".join(f"{c}:{right[drawn['arr_1'] == c].mean():.0%}" for c in range(10))
        print(f"seed {seed}: {right.mean():.1%} of {args.n} images show the requested class ({by_class})")


if __name__ == "__main__":
    main()
