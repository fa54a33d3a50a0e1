"""The command line: help, `trine backends`, and what is said where an extra is missing."""

import subprocess
import sys

from trine import backends, cli
from typer.testing import CliRunner


def invoke(*arguments: str):
    # Wide: no option is broken over lines.
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "backends" in result.output


def test_demo_help_has_the_options_and_an_example():
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for said in ("--temperature", "--alpha", "--fresh", "--out", "Example: trine demo"):
        assert said in result.output


def test_backends_prints_what_describe_says():
    result = invoke("backends")
    assert result.exit_code == 0
    assert result.output.strip() == str(backends.describe()).strip()


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "DEMO_NEEDS", ("rich", "no_such_package"))
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "no_such_package" in result.output
    assert "pip install 'trine[demo]'" in result.output
    assert "rich," not in result.output


def test_demo_refuses_a_wrong_alpha_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "DEMO_NEEDS", ())
    result = invoke("demo", "--alpha", "1.5", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert result.output.strip() == "trine demo: alpha is 1.5; it must be from 0 to 1"


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import trine.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "trine: the command line needs typer; install it with: pip install 'trine[demo]'"
    )
