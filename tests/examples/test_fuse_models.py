"""The toy and the way to the real thing, in a few steps."""

import json
import random

import fuse_models
import pytest
from datasets import load_from_disk

pytest.importorskip("trl", minversion="1.14", reason="TRL 1.14 or newer is not installed; extra 'fusechat'")
pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")


def test_the_rewards_are_what_the_text_says():
    assert fuse_models.rewards(["Rabcde", "Sabcde", "Uabcda"], ["fghijklm", "gikmoqsu", "zyxwvuts"]) == pytest.approx(
        [0.1] * 3
    )
    assert fuse_models.rewards(["Rabcde"], ["fghixxxx"]) == pytest.approx([0.05])
    assert fuse_models.rewards(["Rabcde"] * 2, ["fghijkl", "fghijkRl"]) == [0.0, 0.0]
    source = random.Random(0)
    assert fuse_models.rewards(["Sabcdz"], [fuse_models.taught_answer("Sabcdz", 1.0, source)]) == pytest.approx([0.1])


def test_the_toy_ends_in_a_packed_model_which_the_real_way_goes_on_from(tmp_path, capsys, monkeypatch):
    fuse_models.main(["--smoke", "--output_dir", str(tmp_path), "--four_bit", "int4"])
    shown = capsys.readouterr().out
    assert "target + SFT + DPO" in shown
    assert "what each source gave" in shown
    assert (tmp_path / "dpo" / "4bit" / "model.safetensors").exists()

    rows = [
        {"prompt": f"R{'abcde'[i]}bcde", "source": "x", "response": text, "reward": reward}
        for i in range(5)
        for text, reward in (("fghijklm", 0.1), ("fghijkzz", 0.07))
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from hf_stablespam.recipes.fusechat import command

    command.main([str(tmp_path / "answers.jsonl"), "-o", str(tmp_path / "data")])
    assert len(load_from_disk(tmp_path / "data")["dpo"]) == 3
    real = ["--target", str(tmp_path / "dpo"), "--smoke", "--output_dir", str(tmp_path / "real")]
    with pytest.raises(SystemExit, match="--target needs --data"):
        fuse_models.main(real)
    fuse_models.main([*real, "--data", str(tmp_path / "data")])
    assert (tmp_path / "real" / "dpo" / "model.safetensors").exists()


@pytest.mark.slow
def test_both_stages_make_a_weak_target_better(tmp_path):
    """With answers of the sources as they were taught; the target's own training, sampling and measuring are real."""
    tokenizer, draw = fuse_models.letters_tokenizer(), random.Random(0)
    target = fuse_models.taught_model(dict.fromkeys("RSU", 0.2), tokenizer, 60, 0, tmp_path / "taught")
    held_out = fuse_models.make_prompts(200, draw)
    before, _ = fuse_models.measure(target, tokenizer, held_out)
    rows = [
        {"prompt": prompt, "source": good, "response": fuse_models.taught_answer(prompt, skill, draw)}
        for prompt in fuse_models.make_prompts(400, draw)
        for good in "RSU"
        for skill in [0.7 if prompt[0] == good else 0.3] * 4
    ]
    data = fuse_models.build_preference_dataset(fuse_models.score_responses(rows, fuse_models.rewards, batch_size=1000))
    sizes = fuse_models.Sizes(sft=100, dpo=30)
    sft_args, dpo_args = fuse_models.toy_settings(tmp_path, sizes, 0)
    fused = fuse_models.train_target(target, tokenizer, data, sft_args, dpo_args)
    after, malformed = fuse_models.measure(fused, tokenizer, held_out)
    assert after > 2 * before
    assert malformed < 30  # it has had 60 steps in all before SFT, and 15 % with this seed
