import pytest
import torch

from synthetic_video import interpolation_matrix, synthetic_video


def test_frame_zero_is_the_image_bit_for_bit():
    images = torch.rand(2, 3, 32, 32)
    video = synthetic_video(images)
    assert video.shape == (2, 16, 3, 32, 32)
    assert torch.equal(video[:, 0], images)
    assert torch.equal(synthetic_video(images, 1)[:, 0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_stay_in_range_on_the_hardest_images(dtype):
    for images in (torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.rand(4, 3, 32, 32).round()):
        video = synthetic_video(images.to(dtype))
        assert video.dtype == dtype
        assert video.min() >= 0
        assert video.max() <= 1


def test_it_is_deterministic_and_leaves_the_random_state_alone():
    images = torch.rand(1, 3, 32, 32)
    state = torch.get_rng_state()
    assert torch.equal(synthetic_video(images), synthetic_video(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_frames_leave_the_image_slowly_and_smoothly():
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    video = synthetic_video(images)
    steps = (video[:, 1:] - video[:, :-1]).abs().mean(dim=(0, 2, 3, 4))
    away = (video - video[:, :1]).abs().mean(dim=(0, 2, 3, 4))
    assert away[1] < 0.02
    assert 0.03 < away[-1] < 0.2
    assert steps.max() < 2.5 * steps.mean()  # no jump
    assert (away[1:] - away[:-1]).min() > -0.01


def test_gradient_reaches_the_image_through_every_frame_also_at_black_and_white():
    for value in (0.0, 0.5, 1.0):
        for frame in range(16):
            images = torch.full((1, 3, 32, 32), value, requires_grad=True)
            synthetic_video(images)[:, frame].sum().backward()
            assert images.grad.abs().sum() > 0.5 * images.numel()


def test_transparency_moves_with_the_colours_and_does_not_fade():
    images = torch.rand(2, 1, 20, 32).expand(-1, 4, -1, -1)
    video, grey = synthetic_video(images), synthetic_video(torch.ones(1, 4, 20, 32))
    assert torch.equal(video[:, :, :3], synthetic_video(images[:, :3]))
    assert (grey[:, :, 3] - 1).abs().max() < 1e-6
    assert grey[:, -1, :3].max() < 1
    moved = synthetic_video(torch.cat([images[:, :3], 1 - images[:, 3:]], dim=1))[:, :, 3:]
    assert torch.allclose(moved, 1 - video[:, :, 3:], atol=1e-5)
    assert (video[:, -1, 3] - images[:, 3]).abs().mean() > 0.01


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_gradcheck(channels):
    images = torch.rand(1, channels, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: synthetic_video(x, 3), images)
    assert torch.autograd.gradgradcheck(lambda x: synthetic_video(x, 3).square(), images)


def test_interpolation_matrix_reads_between_samples_and_holds_the_ends():
    line = torch.tensor([10.0, 20.0, 40.0])
    matrix = interpolation_matrix(torch.tensor([-1.0, 0.0, 0.5, 1.75, 9.0]), 3)
    assert torch.allclose(matrix @ line, torch.tensor([10.0, 10.0, 15.0, 35.0, 40.0]))


@pytest.mark.parametrize("images", [torch.rand(3, 32, 32), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_float_images_is_refused_with_its_shape(images):
    with pytest.raises(ValueError, match=r"expected float images \(N, C, H, W\), got torch"):
        synthetic_video(images)
    with pytest.raises(ValueError, match="at least one frame"):
        synthetic_video(torch.rand(1, 3, 8, 8), 0)
