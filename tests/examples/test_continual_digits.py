import json

import continual_data
import continual_digits
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from matplotlib import image as pictures
from PIL import Image as Picture
from transformers import ViTConfig, ViTModel

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_five_tasks_by_both_methods_and_a_picture(tmp_path, capsys):
    continual_digits.main(["--output_dir", str(tmp_path), "--smoke", "--classes_per_task", "4", "--four_bit", "int4"])
    printed = capsys.readouterr().out
    for name in ("naive", "online", "offline", "ensemble"):
        assert f"\n{name}" in printed
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert [len(labels.split(", ")) for labels in written["classes"] if "," in labels] in ([2], [])
    assert {name: [len(row) for row in matrix] for name, matrix in written["accuracy"].items()} == {
        name: [1, 2, 3] for name in ("naive", "online", "offline", "ensemble")
    }
    assert written["accuracy"]["online"][0] == written["accuracy"]["offline"][0]
    picture = pictures.imread(tmp_path / "accuracy.png")
    assert picture.std() > 0.1


def test_digits_are_dealt_out_without_overlap():
    pretraining, tasks = continual_data.digit_tasks(seed=1, classes_per_task=2)
    assert len(pretraining) == 2100
    assert sorted(label for task in tasks for label in task.labels) == list(range(10))
    assert sum(len(task.train) for task in tasks) == 700
    assert sum(len(task.test) for task in tasks) == 397
    for task in tasks:
        assert set(task.train.labels.tolist()) == set(task.test.labels.tolist()) == set(task.labels)
    upright = {image.numpy().tobytes() for task in tasks for image in (*task.train.images, *task.test.images)}
    seen = {image.rot90(4 - turn, (1, 2)).numpy().tobytes()
            for turn in (1, 2, 3) for image in pretraining.images[700 * (turn - 1) : 700 * turn]}  # fmt: skip
    assert len(seen & upright) <= 2  # the data set has a few equal images


@pytest.mark.parametrize(("split", "method"), [("train and test", "adapter"), ("train only", "prefix")])
def test_images_of_a_data_set_and_a_model_from_a_folder(split, method, tmp_path):
    generator = np.random.default_rng(0)
    features = Features({"img": Image(), "fine_label": ClassLabel(num_classes=4)})
    rows = [(Picture.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)), i % 4) for i in range(24)]
    images, labels = map(list, zip(*rows, strict=True))
    table = Dataset.from_dict({"img": images, "fine_label": labels}, features)
    parts = DatasetDict({"train": table} if split == "train only" else {"train": table, "test": table})
    for name, part in parts.items():
        part.to_parquet(tmp_path / "data" / f"{name}.parquet")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    options = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "model")]
    options += ["--method", method, "--adapted_layers", "1", "--optim", "adamw_torch"]
    continual_digits.main(["--output_dir", str(output), "--smoke", *options])
    assert len(json.loads((output / "accuracy.json").read_text())["accuracy"]["ensemble"]) == 2


def test_crops_keep_the_picture():
    ramp = np.tile(np.arange(0, 200, 5, dtype=np.uint8)[None, :, None], (30, 1, 3))  # brighter to the right
    picture = Picture.fromarray(ramp)
    centre = continual_data.centre_crop(picture, 14)
    assert centre.shape == (3, 14, 14)
    assert 0 <= centre.min() < centre.max() <= 1
    assert (centre[0].diff(dim=1) >= 0).all()
    torch.manual_seed(0)
    crops = [continual_data.random_crop(picture, 14) for _ in range(40)]
    assert {crop.shape for crop in crops} == {(3, 14, 14)}
    slopes = torch.stack([crop[0, 7, -1] - crop[0, 7, 0] for crop in crops])
    assert 10 < (slopes < 0).sum() < 30  # about half are mirrored
    assert slopes.abs().std() > 0.05  # crops of many widths


def test_options_that_do_not_go_together(tmp_path):
    with pytest.raises(SystemExit, match="give both --dataset_name and --model_name_or_path"):
        continual_digits.main(["--output_dir", str(tmp_path), "--model_name_or_path", "x"])
    with pytest.raises(SystemExit, match="--method must be lora, adapter or prefix, got x"):
        continual_digits.pet_config(continual_digits.ScriptArguments(method="x"))
