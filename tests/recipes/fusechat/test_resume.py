"""What a run is gone on with: the same rows, however they are kept, and the same settings, whatever the versions."""

import json

import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk
from peft import LoraConfig

from hf_stablespam.recipes.fusechat import build_preference_dataset, train_target
from tests.recipes.fusechat.helpers import LETTERS, preferences, scored_rows, target, tokenizer
from tests.recipes.fusechat.test_training import KillIn, run_in, settings

pytest.importorskip("trl", minversion="1.14", reason="TRL 1.14 or newer is not installed; extra 'fusechat'")


def other_texts():
    """The same prompts, sources and rewards, with other answers: the report's tables are equal."""
    rows = [{**row, "response": LETTERS[index % 16] * 3} for index, row in enumerate(scored_rows())]
    return build_preference_dataset(rows)


def resume(folder, data, **options):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    sft_args, dpo_args = settings(folder, sft=saving, dpo=saving)
    seen = KillIn()
    train_target(target(), tokenizer(), data, sft_args, dpo_args, callbacks=[seen], resume=True, **options)
    return seen.begun


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_other_texts_are_nothing_to_go_on_with(tmp_path, stage):
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn(stage, 3))
    with pytest.raises(ValueError, match=r"the run in .*sft, of which others are given: data set was {'sft': '\w{16}'"):
        resume(tmp_path, other_texts())
    assert resume(tmp_path, preferences())[0] == (stage, 2)


def test_other_pairs_alone_are_other_data(tmp_path):
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn("dpo", 3))
    with pytest.raises(ValueError, match="data set was"):
        resume(tmp_path, {"sft": preferences()["sft"], "dpo": other_texts()["dpo"]})


def test_a_run_saved_without_its_data_and_under_another_peft_goes_on(tmp_path):
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(InterruptedError):
        run_in(tmp_path, 1e-3, KillIn("dpo", 3), peft_config=adapter)
    for file in tmp_path.rglob("fusechat_run.json"):
        run = json.loads(file.read_text())
        run["settings"].pop("data set", None)
        run["settings"]["peft_config"].pop("use_dora")
        run["settings"]["peft_config"] |= {"peft_version": "0.1", "gone_since": 1}
        file.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="peft_config was"):
        resume(tmp_path, preferences(), peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert resume(tmp_path, preferences(), peft_config=adapter) == [("dpo", 2)]


@pytest.mark.parametrize("chat", [False, True])
def test_the_hash_is_of_the_rows_and_not_of_how_they_lie(tmp_path, chat):
    from hf_stablespam.recipes.fusechat.stage_run import content_hash

    rows = preferences(chat=chat)["dpo"]
    expected = content_hash(rows)
    rows.save_to_disk(tmp_path)
    lists = rows.to_list()
    chunks = concatenate_datasets([rows.select(range(3)), rows.select(range(3, len(rows)))])
    swapped = rows.select([1, 0, *range(2, len(rows))])
    assert content_hash(swapped) != expected
    for same in (
        load_from_disk(tmp_path),
        Dataset.from_list(lists),
        chunks,
        swapped.select([1, 0, *range(2, len(rows))]),
    ):
        assert content_hash(same) == expected
    lists[-1]["rejected"] = lists[0]["rejected"]
    assert content_hash(Dataset.from_list(lists)) != expected
