"""The command line is a contract: option names, one-line errors, exit codes, JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from sapf_ray import __version__, registry
from sapf_ray.config import RunConfig, flatten, from_dict, result_keys, to_dict
from sapf_ray.config.fields import fields
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
        (["--data.source", "imagenet"], ["data.source = 'imagenet'", "digits"]),
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


def help_of(capsys, key: str) -> str:
    """What `sapf run --help` says of one key, on one line."""
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    words = " ".join(out.split())
    start = re.search(rf"--{re.escape(key)} (?:\[|[A-Z])", words)
    assert start is not None, f"{key} is not in the help"
    return words[start.start() :].partition(" --")[0]


def test_help_names_units_and_defaults(capsys):
    text = help_of(capsys, "saliency.noise_multiplier")
    assert "Noise std over sensitivity" in text and text.endswith("(default: 25.0)")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("privacy.epsilon", "EPSILON (float > 0) "),
        ("privacy.delta", "DELTA (float in (0, 1), or null) "),
        ("privacy.accountant", "ACCOUNTANT ({pld, rdp}) "),
        ("saliency.ratio", "RATIO (float in (0, 1]) "),
        ("finetune.batch_size", "BATCH_SIZE (int >= 1) "),
        ("finetune.ema_decay", "EMA_DECAY (float in [0, 1)) "),
        ("evaluation.enabled", "ENABLED (true or false) "),
        ("data.path", "PATH (str, or null) "),
        ("seed", "SEED (int >= 0) "),
    ],
)
def test_help_shows_choices_and_ranges(capsys, key, words):
    assert help_of(capsys, key).startswith(f"--{key} {words}")


def test_help_shows_every_key_with_its_choices(capsys):
    _, out, _ = call(capsys, "run", "--help")
    words = " ".join(out.split())
    for key, field in fields().items():
        assert f"--{key} " in words
        for name in field.kind.choices() if field.kind.choices else ():
            assert name in words


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"sapf-ray {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    ["--help", "run --help", "tune --help", "methods", "datasets --json", "models", "--version"],
)
def test_what_lists_loads_no_heavy_library(arguments):
    program = (
        "import sys; from sapf_ray.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'scipy', 'matplotlib', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[]\n" and len(done.stdout) > 10


def test_planning_without_data_loads_neither_torch_nor_ray():
    program = (
        "import sys; from sapf_ray.cli import main\n"
        "main(['plan', '--json', '--data.n_records', '45000', '--privacy.accountant', 'rdp'])\n"
        "print(sorted({'torch', 'ray', 'diffusers', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.long
def test_a_later_synthesis_imports_nothing_that_trains_or_samples():
    """Seconds of its start: sampling actors import diffusers, its own process does not."""
    program = (
        "import sys; import sapf_ray.reuse.commands\n"
        "print(sorted({'diffusers', 'transformers', 'peft', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_plugins_row_is_listed_and_taken(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(registry.PLUGINS, "")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_sources.py").write_text(
        "from sapf_ray.data.base import SOURCES, ImageSource, register\n"
        "@register('thirty')\n"
        "class Thirty(ImageSource):\n"
        "    n_train = 30_000\n"
        "    class_names, prompts = ('cat', 'dog'), ('a cat', 'a dog')\n"
        "    def __init__(self, config): pass\n"
        "    read = labels = fingerprint = verify = None\n"
        "def forget(): del SOURCES['thirty']\n"
    )
    code, _, err = call(capsys, "plan", "--data.source", "thirty")
    assert code == 2 and "data.source = 'thirty': must be one of" in err
    options = ("--plugins", "my_sources", "--data.source", "thirty")
    try:
        code, out, err = call(capsys, "plan", "--json", "--privacy.accountant", "rdp", *options)
        assert code == 0, err
        assert json.loads(out)["n_records"] == 30_000
        file = tmp_path / "c.yaml"
        file.write_text("plugins: [my_sources]\ndata: {source: thirty}\n")
        code, out, err = call(capsys, "plan", "--config", str(file), "--json")
        assert code == 0, err
        assert "thirty" in call(capsys, "run", "--help")[1]
    finally:
        sys.modules["my_sources"].forget()
        registry._loaded.discard("my_sources")


def test_a_flag_overrides_files_wherever_it_stands(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("privacy: {epsilon: 2, accountant: rdp}\nfinetune.steps: 7\n")
    code, out, _ = call(
        capsys, "plan", "--privacy.epsilon", "4", "--config", str(file), "--preset=digits", "--json"
    )
    plan = json.loads(out)
    assert (code, plan["epsilon"], plan["steps"]) == (0, 4.0, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("privacy: 3", "privacy = 3: must be a mapping"),
        ("privacy:", "privacy = None: must be a mapping"),
        ("- 1", "must be a mapping of keys to values"),
        ("a: [", "not valid YAML"),
        ("privacyy: {}", "privacyy = {}: unknown key"),
        ("finetune: {steps: 1e3}", "finetune.steps = 1000.0: must be an integer of at least 0"),
        ("model: {class_labels: 3}", "model.class_labels = 3: must be a list"),
        ("plugins: no_such_module", "plugins = 'no_such_module': must be a list"),
        ("plugins: [no_such_module]", "plugins = 'no_such_module': cannot be imported"),
    ],
)
def test_a_file_that_is_none_is_one_line(capsys, tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    code, _, err = call(capsys, "plan", "--config", str(file))
    assert code == 2 and words in err and err.count("\n") == 1


def test_numbers_in_exponent_form_are_numbers(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("finetune: {learning_rate: 1e-3}\n")
    options = ("--data.n_records", "1000", "--finetune.batch_size", "100", "--json")
    assert call(capsys, "plan", "--config", str(file), *options)[0] == 0
    assert call(capsys, "plan", "--finetune.learning_rate", "1e-3", *options)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "required: --out"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["plan", "extra"], "unrecognized arguments: extra"),
        (["plan", "--json", "maybe"], "--json = 'maybe': must be true or false"),
        (["tune", "digits", "--retries", "x"], "--retries = 'x': must be an integer"),
        (["reproduce", "table9", "--format", "html"], "--format = 'html': must be one of text"),
        (["plan", "--seed"], "--seed: expected one argument"),
        (["plan", "--sed", "3"], "sed: unknown key; allowed: "),
    ],
)
def test_wrong_options_are_one_line(capsys, arguments, words):
    code, _, err = call(capsys, *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
