import pytest
import torch

from augmentation import NUM_AUGMENT_NUMBERS, augment

NO_CHANGE = 0.5  # but the first number mirrors below a half


def test_middle_numbers_change_nothing_and_the_first_mirrors():
    images = torch.rand(2, 3, 16, 16)
    numbers = torch.full((2, NUM_AUGMENT_NUMBERS), NO_CHANGE)
    numbers[:, 0] = torch.tensor([0.5, 0.1])
    out = augment(images, numbers)
    assert torch.allclose(out[0], images[0], atol=1e-5)
    assert torch.allclose(out[1], images[1].flip(-1), atol=1e-5)


def test_the_same_numbers_give_the_same_transform_and_others_another():
    images = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1)
    numbers = torch.rand(3, NUM_AUGMENT_NUMBERS)
    numbers[1] = numbers[0]
    out = augment(images, numbers)
    assert torch.equal(out[0], out[1])
    assert (out[0] - out[2]).abs().mean() > 0.01


def test_shift_moves_down_and_right_by_an_eighth_at_most():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8, 8] = 1
    numbers = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 0.5]])
    assert augment(images, numbers)[0, 0].argmax() == 10 * 16 + 10


def test_transparency_is_moved_and_keeps_its_values():
    images, numbers = torch.rand(1, 1, 16, 24).expand(3, 4, -1, -1), torch.rand(3, NUM_AUGMENT_NUMBERS)
    numbers[1], numbers[2] = numbers[0], numbers[0]
    numbers[1, 4:], numbers[2, 4:] = 0.5, torch.tensor([0.9, 0.1])  # as it is; brighter with less contrast
    out = augment(images, numbers)
    assert torch.equal(out[1, 3], out[2, 3])
    assert torch.allclose(out[1, 3], out[1, 0], atol=1e-5)
    assert (out[1, 0] - out[2, 0]).abs().mean() > 0.05


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 6), (2, 4, 6, 8)])
def test_gradient_reaches_the_image(shape):
    images = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    numbers = torch.rand(2, NUM_AUGMENT_NUMBERS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: augment(x, numbers), images)
