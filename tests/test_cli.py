"""The command line is a contract: option names, one-line errors, exit codes, JSON."""

from __future__ import annotations

import json

import pytest
import yaml

from sapf_ray.config import RunConfig, flatten, from_dict, result_keys, to_dict
from sapf_ray.errors import ConfigError
from tests.commands import call

CONTRACT = (
    "data.source",
    "data.path",
    "data.n_records",
    "model.path",
    "privacy.epsilon",
    "privacy.delta",
    "privacy.accountant",
    "saliency.score",
    "saliency.noise_multiplier",
    "saliency.sample_rate",
    "saliency.ratio",
    "finetune.batch_size",
    "finetune.steps",
    "finetune.lora_rank",
    "finetune.num_workers",
    "synthesis.n_images",
    "synthesis.num_actors",
    "evaluation.enabled",
    "seed",
)


def test_option_names_are_kept():
    assert set(CONTRACT) <= set(flatten(to_dict(RunConfig())))


def test_config_round_trip_through_yaml():
    config = from_dict({"privacy": {"epsilon": 3.0}, "saliency": {"ratio": 0.5}, "seed": 4})
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert result_keys(config)["privacy.epsilon"] == 3.0
    assert "finetune.num_workers" not in result_keys(config)


def test_plan_json_without_data(capsys):
    code, out, _ = call(
        capsys,
        "plan",
        "--json",
        "--data.n_records",
        "45000",
        "--privacy.epsilon",
        "10",
        "--privacy.accountant",
        "rdp",
        "--saliency.noise_multiplier",
        "5",
        "--finetune.batch_size",
        "4096",
        "--finetune.steps",
        "1000",
    )
    plan = json.loads(out)
    assert code == 0
    assert plan["finetune"]["noise_multiplier"] == pytest.approx(1.796, rel=0.01)
    assert plan["selection"]["sample_rate"] == 1 and plan["composed_epsilon"] <= 10
    assert {"epsilon", "delta", "accountant", "n_records", "sample_rate", "steps"} <= set(plan)


def test_plan_table_of_a_preset_and_flag_over_preset(capsys):
    code, out, _ = call(capsys, "plan", "--preset", "digits", "--privacy.epsilon", "3")
    assert code == 0 and "ε = 3" in out and "1,297" in out


def test_config_file_between_preset_and_flags(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("privacy: {epsilon: 2.0, accountant: rdp}\n")
    code, out, _ = call(
        capsys,
        "plan",
        "--preset",
        "digits",
        "--config",
        str(file),
        "--privacy.epsilon",
        "4",
        "--json",
    )
    plan = json.loads(out)
    assert (code, plan["epsilon"], plan["accountant"], plan["steps"]) == (0, 4.0, "rdp", 60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--privacy.epsilom", "3"], ["privacy.epsilom", "did you mean privacy.epsilon"]),
        (["--privacy.epsilon", "0"], ["privacy.epsilon = 0", "above 0"]),
        (["--privacy.epsilon", "abc"], ["privacy.epsilon = 'abc'", "float"]),
        (["--privacy.delta", "1"], ["privacy.delta = 1", "(0, 1)"]),
        (["--saliency.ratio", "0"], ["saliency.ratio = 0", "(0, 1]"]),
        (["--saliency.ratio", "1.01"], ["saliency.ratio = 1.01", "(0, 1]"]),
        (
            ["--saliency.score", "magic"],
            ["saliency.score = 'magic'", "per_sample_norm, noisy_mean_gradient"],
        ),
        (
            ["--data.n_records", "100", "--finetune.batch_size", "101"],
            ["finetune.batch_size = 101", "100"],
        ),
        (["--data.source", "mnist"], ["data.source = 'mnist'", "digits"]),
        (["--data.source", "image_folder", "--data.path", "/no/such/folder"], ["/no/such/folder"]),
        (["--preset", "nope"], ["--preset nope", "digits"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
        (
            [
                "--data.n_records",
                "1000",
                "--finetune.batch_size",
                "100",
                "--privacy.epsilon",
                "1",
                "--saliency.noise_multiplier",
                "0.5",
            ],
            ["saliency.noise_multiplier = 0.5", "selection alone spends"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, words):
    code, out, err = call(capsys, "plan", *arguments)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def test_unknown_key_in_yaml_names_it(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("privacy: {epsilom: 2.0}\n")
    code, _, err = call(capsys, "plan", "--config", str(file))
    assert code == 2 and "privacy.epsilom" in err and err.count("\n") == 1
    with pytest.raises(ConfigError, match=r"privacy\.epsilom"):
        from_dict({"privacy": {"epsilom": 2.0}})
    with pytest.raises(ConfigError, match="privacyy"):
        from_dict({"privacyy": {}})


def test_help_names_units_and_defaults(capsys):
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    assert "Noise std over sensitivity" in " ".join(out.split())
    assert "default: 0.3" in out
