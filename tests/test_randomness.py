import torch

from randomness import latent_noise, random_generator


def test_random_generator_is_a_function_of_its_key():
    draws = {key: tuple(torch.rand(4, generator=random_generator(*key)).tolist())
             for key in ((0, "critic", 1), (0, "critic", 2), (0, "generator", 1), (1, "critic", 1))}
    assert len(set(draws.values())) == 4
    assert tuple(torch.rand(4, generator=random_generator(0, "critic", 1)).tolist()) == draws[0, "critic", 1]


def test_latent_noise_does_not_depend_on_how_much_of_it_is_drawn():
    many = latent_noise(3, range(20), 13)
    assert torch.equal(latent_noise(3, [17, 4], 13), many[[17, 4]])
    assert len(set(many[:, 0].tolist())) == 20
    assert not torch.equal(latent_noise(4, range(20), 13), many)
    assert not torch.equal(latent_noise(3, range(20), 13, purpose="walk"), many)


def test_latent_noise_is_standard_normal():
    z = latent_noise(0, range(200), 100)
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03
