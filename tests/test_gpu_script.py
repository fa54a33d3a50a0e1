"""benchmarks/gpu.sh, with stand-ins for every tool that it calls: what it runs and reports."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STEPS = ("build", "device", "probes", "suite", "memcheck", "racecheck", "initcheck", "benchmarks")

# It notes what it is asked; a step whose words contain FAIL_AT fails, one with HANG_AT hangs.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
[[ -n "$FAIL_AT" && "$*" == *$FAIL_AT* ]] && { echo "it went wrong"; exit 7; }
case "$*" in
*get_device_capability*) echo "$DEVICE" ;;
*xdist*) exit 1 ;;
*"benchmarks.run gpu"*)
  mkdir -p benchmarks/results
  echo "{}" >benchmarks/results/some-gpu.json
  echo "the tables" ;;
*"benchmarks.run goals"*) echo "the goals" ;;
esac
"""
TOOL = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n'
SANITIZER = TOOL + 'shift 4\nexec "$@"\n'


@pytest.fixture
def run(tmp_path):
    """Runs a copy of the script: it writes and deletes beside where it stands."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    for name, text in (("python3", PYTHON), ("cmake", TOOL), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments: str, device: str = "90", fail_at: str = "") -> tuple[int, str, str, str]:
        environment = {"DEVICE": device, "FAIL_AT": fail_at, "CALLS": str(calls)}
        ended = subprocess.run(
            ["bash", tmp_path / "benchmarks" / "gpu.sh", *arguments],
            env=os.environ | environment | {"PYTHON": str(tools / "python3")},
            capture_output=True,
            text=True,
        )
        return ended.returncode, ended.stdout, ended.stderr, calls.read_text()

    return run


def test_every_step_runs_and_the_summary_says_so(run):
    status, output, errors, calls = run()
    assert (status, errors) == (0, "")
    summary = output[output.index("s in all") :]
    for name in (*STEPS, "goals"):
        assert f"\n{name} " in summary
    assert summary.count(" s  ok") == len(STEPS) + 1
    assert "the tables" in output
    assert "the goals" in output
    assert "benchmarks/results/some-gpu.json" in summary
    assert "-DTRINE_CUDA=ON -DTRINE_CUDA_ARCHITECTURE=90" in calls
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9" in calls
    # Timed last and alone; what goes before has ended by then.
    lines = calls.splitlines()
    begun = next(i for i, line in enumerate(lines) if "benchmarks.run gpu" in line)
    assert all("goals" in line for line in lines[begun + 1 :])


def test_every_test_file_is_in_one_step_or_left_out_aloud(run):
    _, output, _, calls = run()
    tests = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    (suite,) = (line for line in calls.splitlines() if "--ignore" in line)
    ignored = {Path(word).name for word in suite.split() if word.startswith("tests/test_")}
    assert ignored <= tests
    elsewhere = {
        Path(word).name for line in calls.splitlines() for word in line.split() if line != suite
    }
    left_out = {Path(word.strip(",")).name for word in output.split() if "tests/test_" in word}
    assert ignored - elsewhere == left_out


@pytest.mark.parametrize(
    "step", ["tests/test_cuda_device.py", "benchmarks.run gpu", "device_calls"]
)
def test_a_step_that_fails_stops_no_other(run, step):
    status, output, _, calls = run(fail_at=step)
    assert status == 1
    assert "FAILED: exit status 7" in output
    assert "it went wrong" in output
    assert "benchmarks.run gpu" in calls
    assert calls.count("-m pytest") == 3


def test_where_cuda_does_not_build_triton_is_measured(run):
    status, output, _, calls = run(fail_at="cuda_library.loaded")
    assert status == 1
    assert "-DTRINE_CUDA=OFF" in calls
    assert "\nbuild_cpu " in output
    assert "benchmarks.run gpu" in calls


def test_without_a_gpu_one_sentence_says_so(run):
    status, output, errors, _ = run(device="")
    assert (status, output) == (2, "")
    assert errors.startswith("gpu.sh: the torch of ")
    assert errors.count("\n") == 1


def test_help(run, tmp_path):
    (tmp_path / "calls").touch()
    status, output, _, calls = run("--help")
    assert status == 0
    assert "bash benchmarks/gpu.sh" in output
    assert calls == ""
    assert run("--fast")[0] == 2
