"""--class-conditional: from the class folders to images of one class."""
import pathlib

import pytest
import torch
from helpers import STATE, TINY, assert_same, newest, read, save_picture, tiny_arguments

import evaluate
import generate
import training
import wgan_gp
from batches import critic_batch, generator_batch
from checkpointing import (
    CheckpointError,
    class_names,
    class_names_for_file,
    load_checkpoint,
    load_generator,
    save_checkpoint,
)
from config import Config
from fast_paths import use_fast_layers, written_out_gradient
from image_data import class_labels, load_images
from image_files import DataError
from losses import kl_divergence
from model_definitions import CLASS_SCALE, VAE, Discriminator
from randomness import drawn_labels, latent_noise

COLOURS = {"blue": (20, 30, 220), "green": (30, 190, 40), "red": (220, 40, 30)}
CONDITIONAL = {"class_conditional": True}


@pytest.fixture
def colours(tmp_path):
    """Twelve pictures of three colours, which are their classes, in an order that mixes them, and a broken one."""
    folder = tmp_path / "images"
    for index in range(12):
        name = list(COLOURS)[index % 3]
        shade = tuple(max(0, value - 3 * index) for value in COLOURS[name])
        save_picture(folder / name / f"{index}.png", color=shade, size=(32, 32))
    (folder / "green" / "05.png").write_text("broken")
    return folder


def conditional_gan(num_classes=3, **settings):
    config = Config(**{"data": "x", **TINY, **CONDITIONAL, **settings})
    return wgan_gp.GAN(config, torch.device("cpu"), num_classes=num_classes)


def moved(gan):
    """The same, with vectors of classes that are not zero."""
    for network in (gan.generator, gan.critic, gan.averaged):
        torch.manual_seed(1)
        torch.nn.init.normal_(network.classes.weight)
    return gan


def test_at_the_start_the_networks_are_those_without_classes():
    plain, gan = wgan_gp.GAN(Config(data="x", **TINY), torch.device("cpu")), conditional_gan()
    for name in wgan_gp.NETWORKS:
        weights, with_classes = getattr(plain, name).state_dict(), getattr(gan, name).state_dict()
        assert list(with_classes)[:-1] == list(weights)
        assert all(torch.equal(with_classes[key], weights[key]) for key in weights)
    z, images, y = torch.randn(4, 8), torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    assert torch.equal(gan.generator.decode(z, y), plain.generator.decode(z))
    assert torch.equal(gan.critic(images, y), plain.critic(images))
    assert not any("class" in name for name in [*plain.state()["generator"], *plain.state()["critic"]])


def test_labels_change_images_and_scores():
    gan = moved(conditional_gan())
    z, images = torch.randn(1, 8).expand(3, -1), torch.rand(1, 3, 32, 32).expand(3, -1, -1, -1)
    y = torch.arange(3)
    assert (gan.generator.decode(z, y)[0] - gan.generator.decode(z, y)[1]).abs().max() > 1e-3
    assert torch.equal(gan.generator.decode(z, y), gan.generator.decode(z + gan.generator.class_latents(y)))
    assert gan.critic(images, y).unique().numel() == 3
    one = gan.critic(images[:1], y[1:2]) - gan.critic(images[:1])
    features = gan.critic.blocks(2 * images[:1] - 1).mean(dim=(2, 3))
    assert torch.allclose(one, (CLASS_SCALE * features * gan.critic.classes.weight[1]).sum(), atol=1e-5)


@pytest.mark.parametrize("network", ["generator", "critic"])
def test_labels_that_are_none_are_refused(network):
    gan = conditional_gan()
    plain = {"generator": VAE(image_size=32, latent_dim=8), "critic": Discriminator(image_size=32)}[network]
    given = torch.randn(2, 8) if network == "generator" else torch.rand(2, 3, 32, 32)

    def call(model, y):
        return model.decode(given, y) if network == "generator" else model(given, y)

    with pytest.raises(ValueError, match=r"expected labels from 0 to 2, got \[0, 3\]"):
        call(getattr(gan, network), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="the network has no classes: --class-conditional"):
        call(plain, torch.tensor([0, 1]))


@pytest.mark.parametrize("settings", [
    {}, {"image_size": 64}, {"image_size": (32, 48)}, {"channels": 1}, {"output_layer": "none"}])
def test_the_written_out_gradient_is_that_of_autograd(settings):
    gan, lines, y = moved(conditional_gan(**settings)), [], torch.tensor([2, 0, 1])
    use_fast_layers(gan, report=lines.append)
    assert gan.input_gradient
    assert not lines
    critic = gan.critic.double()
    for sides in critic.image_sizes:
        images = torch.rand(3, critic.image_shape[0], *sides, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(critic(images, y).sum(), images)
        torch.testing.assert_close(written_out_gradient(critic, images.detach(), labels=y), expected, rtol=1e-10, atol=1e-12)


def test_the_generated_image_has_the_class_of_the_real_one_at_its_place(monkeypatch):
    gan, seen = moved(conditional_gan()), []
    forward = gan.critic.forward
    monkeypatch.setattr(gan.critic, "forward", lambda images, y: seen.append(y.tolist()) or forward(images, y))
    monkeypatch.setattr(gan.generator, "decode", lambda z, y: seen.append(y.tolist()) or torch.rand(4, 3, 32, 32))
    gan.critic_losses(torch.rand(4, 3, 32, 32), torch.randn(4, 8), torch.rand(4, 1, 1, 1), torch.rand(4, 7),
                      torch.tensor([2, 0, 1, 1]))
    assert seen == [[2, 0, 1, 1], 2 * [2, 0, 1, 1], [2, 0, 1, 1]]


def test_encodings_are_drawn_towards_their_class():
    gan = moved(conditional_gan())
    real, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    _, found = gan.generator_losses(real, torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, 7), y)
    mu, logvar = gan.generator.encode(real)
    expected = kl_divergence(mu - CLASS_SCALE * gan.generator.classes(y), logvar)
    assert found["kl_divergence"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["class_distance"] > 1


def test_classes_that_a_batch_has_not_stand_still():
    gan = moved(conditional_gan())
    before = {name: getattr(gan, name).classes.weight.detach().clone() for name in ("generator", "critic")}
    y = torch.tensor([0, 2, 2, 0])
    for _ in range(2):
        gan.critic_update(torch.rand(4, 3, 32, 32), torch.randn(4, 8), torch.rand(4, 1, 1, 1), torch.rand(4, 7), y)
        gan.generator_update(torch.rand(4, 3, 32, 32), torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, 7),
                             torch.tensor(0.5), y)
    for name, weights in before.items():
        change = (getattr(gan, name).classes.weight - weights).abs().amax(dim=1)
        assert change[1] == 0
        assert min(change[0], change[2]) > 0


def test_every_image_keeps_its_class_through_cache_and_batches(colours):
    for _ in range(2):
        data = load_images(colours, 32, cache_dir="cache", skip_bad=True)
        names, labels = class_labels(data)
        assert names == list(COLOURS)
        gan = conditional_gan()
        for step in range(5):
            real, *_, y = critic_batch(gan, data.images, step, 0, 4 * step, labels)
            strongest = real.mean(dim=(2, 3)).argmax(dim=1)  # channel 0 is red, the last of the names
            assert (2 - strongest).tolist() == y.tolist()
            assert generator_batch(gan, real, step, 4, y)[-1] is y


@pytest.mark.parametrize(("files", "said"), [
    (["a.png", "b.png"], "has no class folders"), (["x/a.png", "x/b.png"], "has one class"),
    (["a.png", "x/a.png", "y/a.png"], "has 1 images beside its class folders"),
    (["train/x/a.png", "test/x/a.png"], "has parts of a data set, test, train: ")])
def test_a_folder_without_classes_is_refused_in_one_line(tmp_path, capfd, files, said):
    for file in files:
        save_picture(tmp_path / "set" / file)
    assert training.main(["--data", str(tmp_path / "set"), *tiny_arguments(), "--class-conditional"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("--class-conditional: needs a folder for each class, ")
    assert said in line
    with pytest.raises(DataError):
        class_labels(load_images(tmp_path / "set", 32, cache_dir="cache"))


def train(colours, **settings):
    return training.train(Config(**{"data": str(colours), **TINY, **CONDITIONAL, "skip_bad": True, **settings}))


def test_a_run_goes_on_to_the_bit(colours, capfd):
    straight = train(colours, steps=4, out="straight")
    assert "not learned as classes" not in capfd.readouterr().out
    train(colours, steps=2, out="cut")
    assert_same(newest(train(colours, steps=4, out="cut")), newest(straight))
    state = newest(straight)
    assert class_names(state) == list(COLOURS)
    assert state["class_counts"].tolist() == [4, 4, 4]
    assert state["model_arguments"]["num_classes"] == 3
    assert state["generator"]["classes.weight"].abs().max() > 0


def test_a_run_without_the_option_says_nothing_of_classes_but_that_they_are_unused(colours, capfd):
    run = train(colours, steps=2, class_conditional=False)
    assert "note: class folders are not learned as classes; --class-conditional does that\n" in capfd.readouterr().out
    (path,) = (run / "checkpoints").glob("step_*.pt")
    saved = torch.load(path, weights_only=True)
    assert not {"class_names", "class_counts"} & set(saved)
    assert "num_classes" not in saved["model_arguments"]
    train(colours, steps=2, class_conditional=True)  # another run
    assert sorted(path.name for path in pathlib.Path("runs").iterdir()) == ["images", "images-2"]
    with pytest.raises(CheckpointError, match="--class-conditional: .* has classes, so it is needed"):
        train(colours, steps=3, class_conditional=False, resume=str(newest_path("runs/images-2")), out="new")


def test_the_start_names_the_classes_and_what_is_none_and_pictures_of_two(colours, capfd):
    (colours / "nothing").mkdir()
    (colours / ".hidden").mkdir()
    (colours / "copy").symlink_to("blue")
    (colours / "unreadable").mkdir()
    (colours / "unreadable" / "a.png").write_text("broken")
    (colours / "red" / "0.png").symlink_to(colours / "blue" / "0.png")
    lines = ("'red' (5), 'blue' (4), 'green' (4)", "'copy', 'nothing', 'unreadable'", "red/0.png as blue/0.png")
    train(colours, steps=1)
    said = capfd.readouterr().out
    assert f"\nclasses: {lines[0]}\nnote: no images of their own, so no classes: {lines[1]}\n" in said
    assert f"\nnote: the same picture in two classes: {lines[2]}\n" in said
    train(colours, steps=2)  # from the cache
    assert all(line in capfd.readouterr().out for line in lines[2:])
    train(colours, check_data=True)
    assert f"\nno images of their own: {lines[1]}\n" in capfd.readouterr().out


def newest_path(run):
    return max(pathlib.Path(run, "checkpoints").glob("step_*.pt"))


def test_samples_have_a_row_for_each_class(colours):
    run = train(colours, steps=1)
    assert read(run / "samples" / "step_0000001.png").shape == (3, 3 * 34 + 2, 8 * 34 + 2)


def test_other_class_folders_are_refused_by_name_and_a_new_run_takes_them(colours, capfd):
    run = train(colours, steps=2)
    (colours / "red").rename(colours / "teal")
    with pytest.raises(CheckpointError, match="^--data: this run has no class 'teal', and the images have none of 'red'; "):
        train(colours, steps=3)
    again = train(colours, steps=3, resume=str(newest_path(run)), out="new")
    assert "note: new classes: 'teal'; without images: 'red'" in capfd.readouterr().out
    before, after = newest(run), newest(again)
    assert class_names(after) == ["blue", "green", "red", "teal"]
    # No image has this class any more.
    assert torch.equal(after["critic"]["classes.weight"][2], before["critic"]["classes.weight"][2])
    assert after["class_counts"].tolist() == [4, 4, 0, 4]
    train(colours, steps=4, resume=str(newest_path(run)), out="new")  # and goes on


def test_a_run_with_classes_begins_with_one_without_as_the_same_function(colours, capfd):
    start = train(colours, steps=2, class_conditional=False, out="plain")
    run = train(colours, steps=1, initial_checkpoint=str(start), out="new", generator_learning_rate=1e-12,
                critic_learning_rate=1e-12)
    z = latent_noise(0, range(3), TINY["latent_dim"])
    vae = load_generator(run)
    assert vae.class_names == list(COLOURS)
    assert torch.allclose(vae.decode(z, torch.arange(3)), load_generator(start).decode(z), atol=1e-6)
    (colours / "red").rename(colours / "teal")
    third = train(colours, steps=1, initial_checkpoint=str(run), out="third")
    assert load_generator(third).class_names == ["blue", "green", "red", "teal"]


def test_images_films_and_figures_of_a_run_with_classes(colours, capfd):
    run = train(colours, steps=3, generator_learning_rate=0.1)
    assert generate.main([str(run), "--class", "red", "--num-images", "2"]) == 0
    assert generate.main([str(run), "--class", "all", "--num-images", "3"]) == 0
    assert generate.main([str(run), "--class", "blue", "red", "--video", "0.5"]) == 0
    assert generate.main([str(run), "--num-images", "2"]) == 0
    names = sorted(path.name for path in pathlib.Path("generated").iterdir())
    assert names == ["class002-seed0-00000.png", "class002-seed0-00001.png", "classes-seed0-film.webp",
                     "classes-seed0-grid.png", "seed0-00000.png", "seed0-00001.png"]
    vae, z = load_generator(run), latent_noise(0, [0, 1], TINY["latent_dim"])
    shown = torch.stack([read(pathlib.Path("generated", name)) for name in names[:2]])
    assert (shown - vae.decode(z, torch.tensor([2, 2]))).abs().max() < 1 / 255
    shown = torch.stack([read(pathlib.Path("generated", name)) for name in names[-2:]])
    assert (shown - vae.decode(z, drawn_labels(0, [0, 1], vae.class_counts))).abs().max() < 1 / 255
    capfd.readouterr()
    assert generate.main([str(run), "--class", "red", "--data", str(colours)]) == 0
    assert "note: images are drawn from Gaussians of the encoded images of --data; " in capfd.readouterr().out
    assert generate.main([str(run), "--class", "pink"]) == 2
    assert capfd.readouterr().err == "--class: there is no class 'pink'; there are 'blue', 'green', 'red'\n"
    metrics = evaluate.evaluate(vae, evaluate.Options(data=str(colours), num_images=8, skip_bad=True))
    assert metrics["diversity"] >= 0


def test_a_run_without_classes_asks_for_the_folder_of_its_images(colours, capfd):
    run = train(colours, steps=1, class_conditional=False)
    assert generate.main([str(run), "--class", "red"]) == 2
    assert "this generator has learned no classes" in capfd.readouterr().err


def test_labels_are_drawn_as_often_as_classes_occur():
    counts = torch.tensor([600, 0, 300, 100])
    labels = drawn_labels(0, range(4_000), counts)
    assert torch.equal(labels[7:9], drawn_labels(0, [7, 8], counts))
    assert labels.bincount(minlength=4).tolist() == pytest.approx([2_400, 0, 1_200, 400], abs=130)


def test_a_thousand_classes_with_the_longest_names_can_be_read_again(tmp_path):
    names = [f"{number:04d}{'ü' * 123}" for number in range(1_000)]
    model = STATE["model_arguments"] | {"num_classes": 1_000}
    state = STATE | {"model_arguments": model, "averaged": VAE(**model).state_dict(),
                     "class_names": class_names_for_file(names), "class_counts": torch.ones(1_000, dtype=torch.int64)}
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    assert load_generator(path).class_names == names


@pytest.mark.parametrize("change", [
    {"class_names": class_names_for_file(["a", "b"])}, {"class_names": class_names_for_file(["a", "a", "b"])},
    {"class_names": torch.ones(3)}, {"class_counts": torch.tensor([1, 1])}, {"class_counts": torch.tensor([1, -1, 1])},
    {"class_counts": torch.zeros(3, dtype=torch.int64)}, {"class_names": torch.empty(0, dtype=torch.uint8)},
    {"class_counts": torch.ones(3)}, {"class_names": "a"}])
def test_names_of_classes_that_do_not_fit_are_refused(tmp_path, change):
    model = STATE["model_arguments"] | {"num_classes": 3}
    state = STATE | {"model_arguments": model, "averaged": VAE(**model).state_dict(),
                     "class_names": class_names_for_file(["a", "b", "c"]), "class_counts": torch.tensor([1, 2, 3])}
    assert class_names(load_checkpoint(save_checkpoint(tmp_path, 1, state, keep=1))) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="not a checkpoint of this program: class_"):
        load_checkpoint(save_checkpoint(tmp_path, 2, state | change, keep=1))


def test_classes_that_are_colours_are_learned(colours):
    run = train(colours, steps=250, batch_size=12, warm_up_images=500, latent_dim=64)
    vae, right = load_generator(run), []
    for row in range(3):
        images = vae.decode(latent_noise(0, range(32), 64), torch.full((32,), row))
        right.append((images.mean(dim=(2, 3)).argmax(dim=1) == 2 - row).float().mean())
    assert torch.stack(right).mean() > 0.75  # a third by chance
