import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from conf.errors import ConfigError
from runners.data import build_data
from runners.data.images import resized
from runners.data.loader import val_batch
from tests.runners.conftest import data_config


def build(seed=0, **changes):
    cfg = {"kind": "digits", "val_samples": 297, "as_image": False, "image_size": 8, "channels": 1}
    cfg |= {"label_noise": 0.0, **changes}
    return build_data(data_config(seed, **cfg))


def test_every_digit_is_on_one_side_with_its_own_row():
    bundle = build()
    assert (len(bundle.train), len(bundle.val)) == (1500, 297)
    assert len(set(bundle.train.sample_ids) | set(bundle.val.sample_ids)) == 1797
    pixels, classes = load_digits(return_X_y=True)
    for samples, offset in ((bundle.train, 0), (bundle.val, 1500)):
        for i in range(0, len(samples), 50):
            image, label, index = samples[i]
            row = int(samples.sample_ids[i].removeprefix("digits/"))
            np.testing.assert_array_equal(image.numpy() * 16, pixels[row])
            assert int(label) == classes[row]
            assert samples.domains[i] == f"digit-{classes[row]}"
            assert index == offset + i


@pytest.mark.parametrize(("as_image", "shape"), [(False, (64,)), (True, (1, 8, 8))])
def test_shapes(as_image, shape):
    bundle = build(as_image=as_image)
    batch = val_batch(bundle.val)
    assert bundle.input_shape == shape
    assert bundle.num_classes == 10
    assert bundle.vocab_size is None
    assert batch.inputs.shape == (297, *shape)
    assert batch.inputs.dtype == torch.float32
    assert 0 <= float(batch.inputs.min()) < float(batch.inputs.max()) <= 1
    assert batch.labels.dtype == torch.int64


def test_noise_flips_the_asked_share_of_training_labels_only():
    bundle = build(label_noise=0.1)
    true = [int(domain.removeprefix("digit-")) for domain in bundle.train.domains]
    flipped = np.array([int(bundle.train[i][1]) != true[i] for i in range(1500)])
    assert flipped.sum() == 150
    np.testing.assert_array_equal(flipped, bundle.train.noisy)
    assert not bundle.val.noisy.any()
    assert not build().train.noisy.any()


def test_noise_follows_the_seed_and_the_split_does_not():
    first, again, other = build(0, label_noise=0.1), build(0, label_noise=0.1), build(1, label_noise=0.1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.train.noisy, again.train.noisy)
    assert (first.train.noisy != other.train.noisy).any()
    assert first.val.sample_ids == other.val.sample_ids


def test_a_preview_says_what_the_label_is():
    bundle = build(label_noise=0.5)
    wrong = int(np.flatnonzero(bundle.train.noisy)[0])
    assert "wrong on purpose" in bundle.train.preview(wrong)
    assert len(bundle.train.preview(wrong, 12)) == 12


@pytest.mark.parametrize("changes", [{"label_noise": 1.0}, {"label_noise": -0.1}, {"val_samples": 1797}])
def test_impossible_settings_are_refused(changes):
    key, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=f"data.{key}={value}"):
        build(**changes)


def test_an_unknown_source_is_refused():
    with pytest.raises(ConfigError, match="choose one of interpreter, text, tokens, hf, digits"):
        build_data(data_config(kind="csv"))


def test_images_are_interpolated_and_their_channels_are_alike():
    small, large = build(as_image=True), build(as_image=True, image_size=32, channels=3)
    assert large.input_shape == large.train[0][0].shape == (3, 32, 32)
    assert (small.task, build().task) == ("image_classes", "table_classes")
    for i in range(0, 1500, 100):
        image = large.train[i][0]
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])
        torch.testing.assert_close(image[:1], resized(small.train[i][0][None], 32)[0], rtol=0, atol=0)
    assert large.train.sample_ids == small.train.sample_ids
    assert large.fingerprint != small.fingerprint
