"""The method without the machinery: a semi-supervised GAN on 100 labels, in plain PyTorch.

    python examples/minimal_loop.py             # D and G: ends at a test error of 14.1 %
    python examples/minimal_loop.py --weight 0  # the same D on the 100 labels alone: 25.1 %

D has one logit per class, and the fake logit is fixed at 0 (Salimans et al. 2016, sec. 5), so
log p(fake | x) = -softplus(t) and log p(real | x) = -softplus(-t), with t = logsumexp(logits).
sgan_dist/gan/steps.py is the same loop with augmentation, consistency and exact sums over ranks.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sgan_dist.data.prepare.sources import load_source

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--weight", type=float, default=1.0, help="of the real/fake terms; 0: no G")
args = parser.parse_args()

torch.manual_seed(0)
BATCH, LATENT = 64, 100
digits = load_source("digits")  # 5,000 MNIST digits, 500 of each class
order = torch.randperm(len(digits.train.labels))
images = torch.from_numpy(digits.train.array).flatten(1)[order] / 127.5 - 1  # (5000, 784)
classes = torch.from_numpy(digits.train.labels)[order]
test_x, test_y, images, classes = images[:1000], classes[:1000], images[1000:], classes[1000:]
labeled = torch.cat([(classes == c).nonzero()[:10, 0] for c in range(10)])  # 10 of each class


class Noise(nn.Module):
    """Adds N(0, std^2) noise during training."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x


def layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [weight_norm(nn.Linear(inputs, outputs)), nn.ReLU(), Noise(0.5)]


body = nn.Sequential(Noise(0.3), *layer(784, 500), *layer(500, 250), *layer(250, 250))
head = weight_norm(nn.Linear(250, 10))
G = nn.Sequential(
    nn.Linear(LATENT, 500), nn.BatchNorm1d(500), nn.Softplus(),
    nn.Linear(500, 500), nn.BatchNorm1d(500), nn.Softplus(),
    nn.Linear(500, 784), nn.Tanh(),
)  # fmt: skip
d_optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 3e-3, (0.5, 0.99))
g_optimizer = torch.optim.Adam(G.parameters(), 3e-3, (0.5, 0.99))

for step in range(1, args.steps + 1):
    # D: the class of labeled images, "real" for unlabeled ones, "fake" for generated ones.
    chosen = labeled[torch.randint(len(labeled), (BATCH,))]
    unlabeled = images[torch.randint(len(images), (BATCH,))]
    fake = G(torch.randn(BATCH, LATENT)).detach()
    logits = head(body(torch.cat([images[chosen], unlabeled, fake])))
    of_labeled, of_unlabeled, of_fake = logits.split(BATCH)
    loss = F.cross_entropy(of_labeled, classes[chosen])
    real = F.softplus(-of_unlabeled.logsumexp(1)).mean()
    loss = loss + args.weight / 2 * (real + F.softplus(of_fake.logsumexp(1)).mean())
    d_optimizer.zero_grad()
    loss.backward()
    d_optimizer.step()

    # G: generated images whose mean features are those of real images (sec. 3.1).
    if args.weight:
        real_mean = body(unlabeled).mean(0).detach()
        fake_mean = body(G(torch.randn(BATCH, LATENT))).mean(0)
        g_optimizer.zero_grad()
        (real_mean - fake_mean).square().mean().backward()
        g_optimizer.step()

    if step % 500 == 0 or step == args.steps:
        body.eval()
        wrong = (head(body(test_x)).argmax(1) != test_y).float().mean().item()
        body.train()
        print(f"step {step}: test error {wrong:.1%}", flush=True)
