"""The loss: known answers, open_clip's as a reference, and processes that together do what one does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from lotlip.losses import lotlip_loss

SCALE = torch.tensor([2.0])


def random_features(batch: int = 8, number: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(batch, width, generator=generator)
    texts = torch.randn(batch, number, width, generator=generator)
    return normalize(images, dim=-1), normalize(texts, dim=-1)


def test_two_by_two_by_hand():
    images = torch.eye(2)
    raw = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # logits, image by text: [[2, 1.2], [0, 1.6]]
    long = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # each text is the other image's: [[0, 2], [2, 0]]
    losses = lotlip_loss(images, torch.stack([raw, long], dim=1), SCALE)

    def entropy(own: float, other: float) -> float:
        return math.log(1 + math.exp(other - own))

    image_to_text = (entropy(2, 1.2) + entropy(1.6, 0)) / 2
    text_to_image = (entropy(2, 0) + entropy(1.6, 1.2)) / 2
    assert losses["raw"].item() == pytest.approx((image_to_text + text_to_image) / 2 / 2, abs=1e-6)
    assert losses["long"].item() == pytest.approx(entropy(0, 2) / 2, abs=1e-6)
    assert losses["loss"].item() == pytest.approx((losses["raw"] + losses["long"]).item(), abs=1e-7)


def test_guessing_costs_the_logarithm_of_the_batch():
    images = torch.ones(8, 4) / 2
    losses = lotlip_loss(images, torch.ones(8, 3, 4) / 2, SCALE)
    assert losses["loss"].item() == pytest.approx(math.log(8), abs=1e-6)
    assert losses["raw"].item() == pytest.approx(math.log(8) / 3, abs=1e-6)


def test_one_text_is_open_clips_loss():
    from open_clip.loss import ClipLoss

    images, texts = random_features(number=1)
    found = lotlip_loss(images, texts, SCALE)
    assert found["long"].item() == 0
    torch.testing.assert_close(found["loss"], ClipLoss()(images, texts[:, 0], SCALE[0]))


def test_several_texts_are_the_mean_of_open_clips_losses():
    from open_clip.loss import ClipLoss

    images, texts = random_features()
    expected = torch.stack([ClipLoss()(images, texts[:, n], SCALE[0]) for n in range(4)])
    found = lotlip_loss(images, texts, SCALE)
    torch.testing.assert_close(found["loss"], expected.mean())
    torch.testing.assert_close(found["raw"], expected[0] / 4)


def test_weights_scale_their_terms():
    images, texts = random_features()
    plain = lotlip_loss(images, texts, SCALE)
    weighted = lotlip_loss(images, texts, SCALE, raw_weight=3.0, long_weight=0.5)
    torch.testing.assert_close(weighted["raw"], 3 * plain["raw"])
    torch.testing.assert_close(weighted["long"], 0.5 * plain["long"])
    torch.testing.assert_close(weighted["loss"], weighted["raw"] + weighted["long"])


def test_the_order_of_the_batch_does_not_matter():
    images, texts = random_features()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for name, value in lotlip_loss(images, texts, SCALE).items():
        torch.testing.assert_close(lotlip_loss(images[order], texts[order], SCALE)[name], value)


def loss_and_gradients(part: slice) -> dict[str, Tensor]:
    """Of a linear text tower and a temperature, for the rows of this process.

    The tower's gradient reaches the gathered features through a matrix product: not in row order in memory.
    """
    images, texts = random_features(width=5)
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    log_scale = torch.tensor([1.5], requires_grad=True)
    losses = lotlip_loss(images[part], normalize(texts[part] @ weight, dim=-1), log_scale.exp(), 0.7, 1.3)
    losses["loss"].backward()
    assert weight.grad is not None and log_scale.grad is not None
    return {"loss": losses["loss"].detach(), "weight": weight.grad, "log_scale": log_scale.grad}


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(loss_and_gradients(slice(4 * rank, 4 * rank + 4)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, expected in loss_and_gradients(slice(0, 8)).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, expected, atol=1e-6, rtol=0)
    assert torch.equal(first["loss"], second["loss"])
