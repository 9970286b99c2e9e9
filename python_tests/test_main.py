"""The commands: python -m evokernels export, inspect."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from evokernels import Architecture, FusedEvolvedOptimizer, Genome, __main__, genome, terms, zoo
from evokernels.compiler.canonical import canonical_key
from evokernels.console import exit_code
from evokernels.inspection import SOURCES
from evokernels.kernels.registry import BACKENDS


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})


@pytest.fixture
def run(capsys):
    """A command's exit code, standard output and standard error."""

    def run(*arguments):
        code = __main__.main(arguments)
        return code, *capsys.readouterr()

    return run


def test_a_genome_becomes_a_file_that_trains(run, tmp_path):
    zoo.adamw.save("best_genome.json")
    assert run("export", "best_genome.json", "-o", "my_optimizer.py") == (0, "", "")
    namespace = {"__name__": "my_optimizer"}
    exec((tmp_path / "my_optimizer.py").read_text(encoding="utf-8"), namespace)
    assert namespace["__all__"] == ["MyOptimizer"]
    results = []
    for kind in (namespace["MyOptimizer"], lambda p: FusedEvolvedOptimizer(p, zoo.adamw)):
        parameter = torch.ones(3, requires_grad=True)
        parameter.grad = torch.tensor([1.0, -2.0, 0.0])
        kind([parameter]).step()
        results.append(parameter)
    torch.testing.assert_close(*results)


def test_without_a_file_the_text_goes_to_standard_output(run):
    for output in ((), ("-o", "-")):
        code, text, errors = run("export", "evolved_2025", *output)
        assert (code, errors) == (0, "")
        assert "class Evolved2025(torch.optim.Optimizer):" in text


@pytest.mark.parametrize("name", [*zoo.GENOMES, *zoo.WIDE])
def test_json_comes_back_as_it_was(run, name, tmp_path):
    assert run("export", name, "--format", "json", "-o", "once.json")[0] == 0
    assert run("export", "once.json", "--format", "json", "-o", "twice.json")[0] == 0
    once = (tmp_path / "once.json").read_bytes()
    assert once == (tmp_path / "twice.json").read_bytes()
    assert Genome.load("once.json") == {**zoo.GENOMES, **zoo.WIDE}[name]
    code, text, _ = run("export", name, "--format", "json")
    assert (code, text.encode()) == (0, once)


def test_a_file_goes_before_the_zoo(run):
    zoo.rmsprop.save("adam")
    assert json.loads(run("export", "adam", "--format", "json")[1])["term_types"] == ["RMS_NORM"]


def test_own_terms_come_from_a_file(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from evokernels.terms import average, g, register, tanh\n"
        'register("DAMPED", tanh(g) / (1 + average(abs(g), 0.99)))\n'
    )
    (tmp_path / "own.json").write_text(
        json.dumps(zoo.adam.to_dict() | {"term_types": ["DAMPED"], "alphas": [2.0]})
    )
    code, _, errors = run("export", "own.json")
    assert code == 2
    assert "DAMPED" in errors
    assert "--terms" in errors
    code, text, _ = run("export", "own.json", "--terms", "mine.py")
    assert code == 0
    assert 'MOMENTS = ("average(|g|, 0.99)",)' in text
    assert "        DAMPED = tanh(g) / (1 + average(|g|, 0.99))\n" in text
    code, text, _ = run("inspect", "own.json", "--terms", "mine.py")
    assert code == 0
    assert "a0 ← " in text


ERRORS = [
    (("inspect", "adma"), "there is no file 'adma', and no such genome in the zoo: sgd_momentum, "),
    (
        ("inspect", "run"),
        "cannot read genome 'run': Is a directory; the best genome of that run",
    ),
    (("export", "run/history.csv"), "cannot read genome 'run/history.csv': not JSON: Expecting"),
    (("inspect", "network.json"), "cannot read genome 'network.json': this is an architecture, no"),
    (("export", "nowhere.json"), "there is no file 'nowhere.json', and no such genome in the zoo"),
    (("inspect", "nowhere.json"), "there is no file 'nowhere.json'"),
    (("export", "bad.json"), "cannot read genome 'bad.json': not JSON"),
    (("inspect", "wrong.json"), "cannot read genome 'wrong.json': beta1 must lie in [0, 1)"),
    (("export", "folder"), "cannot read genome 'folder'"),
    (("export", "adam", "-o", "there.py"), "'there.py' exists; choose another name, or --force"),
    (("export", "adam", "-o", "no/where.py"), "cannot write 'no/where.py': No such file"),
    (("export", "adam", "-o", "torch.py"), "'torch.py' would hide Python's module torch from all"),
    (("export", "adam", "-o", "", "--force"), "cannot write '': it is no regular file"),
    (("export", "adam", "-o", "folder", "--force"), "cannot write 'folder': "),
    (("export", "adam", "--terms", "bad.json"), "cannot read terms from 'bad.json'"),
    (
        ("export", "adam", "--terms", "lines.py"),
        "cannot read terms from 'lines.py', line 1: Value",
    ),
    (("export", "adam", "-o", "pipe", "--force"), "cannot write 'pipe': it is no regular file"),
    (("export", "nothing.json"), "this genome leaves every parameter as it is"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors_are_one_line(run, tmp_path, arguments, message):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "wrong.json").write_text(json.dumps(zoo.adam.to_dict() | {"beta1": 2}))
    Genome(["GRAD"], [0.0], wd_log10=-float("inf")).save("nothing.json")
    (tmp_path / "lines.py").write_text("raise ValueError('a\\nb')")
    os.mkfifo("pipe")
    os.mkdir("run")
    zoo.adam.save("run/best_genome.json")
    (tmp_path / "run" / "history.csv").write_text("generation,best\n")
    Architecture(["relu"]).save("network.json")
    (tmp_path / "there.py").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    before = sorted(os.listdir(tmp_path))
    code, printed, errors = run(*arguments)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert ("did you mean 'adam'?" in errors) == ("adma" in arguments)
    assert ("in 'run/best_genome.json'" in errors) == ("run" in arguments[1])
    assert (tmp_path / "there.py").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_is_replaced_when_that_is_asked_for(run, tmp_path):
    (tmp_path / "there.py").write_text("mine")
    assert run("export", "adam", "-o", "there.py", "--force") == (0, "", "")
    assert "class There(" in (tmp_path / "there.py").read_text()


def test_a_summary_says_what_runs_it(run):
    code, text, _ = run("inspect", "evolved_2025")
    assert code == 0
    for part in (
        "p ← p - lr * (0.000974487 * p + 0.734444 * sign(g) + 3.6352 * m / (sqrt(v) + 5.44202e-09)",
        f"key      {canonical_key(zoo.evolved_2025)}",
        "state    m, v in torch.float32",
        "traffic  28 bytes an element and step",
        "memory   8 bytes of state an element",
        "update   0.000974487 * p + 0.734444 * sign(g) + 3.6352 * m / (sqrt(v) + 5.44202e-09)\n",
        "backends for torch.float32 parameters on this machine:",
        "  cpu    evk_g_m_v_float32 (",
        "  eager  14 torch operations a tensor",
    ):
        assert part in text
    assert [name for name in BACKENDS if not re.search(rf"^  {name} ", text, re.M)] == []
    if not torch.cuda.is_available():
        assert "  cuda   not here: torch finds no CUDA device\n" in text
    corrected = "1 / (1 - 0.9^t) * m / (sqrt(1 / (1 - 0.999^t)) * sqrt(v) + 1e-08)"
    assert f"update   {corrected}\n" in run("inspect", "adam")[1]
    assert "memory   16 bytes" in run("inspect", "adam", "--dtype", "float64")[1]


SOURCE = {
    "cpu": "EVK_CLONES void evk_g_m_v_float32(",
    "cuda": "struct Kind0",
    "triton": "def update_0(",
    "eager": "t7 = sqrt(t5)\n",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_need_no_device(run, backend):
    code, text, _ = run("inspect", "evolved_2025", "--backend", backend)
    assert code == 0
    assert SOURCE[backend] in text
    for name in zoo.WIDE:  # rules that no kernel of the package serves
        assert run("inspect", name, "--backend", backend, "--dtype", "bfloat16")[0] == 0


def test_all_sources_at_once(run):
    code, text, _ = run("inspect", "evolved_2025", "--backend", "all")
    assert code == 0
    assert re.findall(r"^======== (\w+)$", text, re.M) == list(SOURCES) == list(BACKENDS)
    assert all(part in text for part in SOURCE.values())


def test_help_has_an_example_of_each_command(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    commands = re.findall(r"^    (\w+)  ", text, re.M)
    assert commands == ["export", "inspect"]
    for command in commands:
        assert f"  python -m evokernels {command} " in text


def shell(line, **variables):
    """Exit code, standard output and standard error of a line of bash, in which $PYTHON is one."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHON": sys.executable, **variables}
    command = ["bash", "-o", "pipefail", "-c", line]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_a_genome_comes_through_a_pipe():
    line = "$PYTHON -m evokernels export adam --format json | $PYTHON -m evokernels export -"
    code, text, errors = shell(line)
    assert (code, errors) == (0, "")
    assert "class Optimizer(" in text


def test_standard_output_that_is_closed():
    code, _, errors = shell("$PYTHON -m evokernels export adam >&-")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: cannot write to standard output or a file: Bad file")


def interrupted():
    raise KeyboardInterrupt


def told():
    print("told", flush=True)


def without_room():
    raise OSError(errno.ENOSPC, "No space left on device")


def nowhere():
    os.rmdir("no/where")


def another_pipe():
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("command", "hint", "code", "message"),
    [
        (told, "all is kept", 141, "nobody reads what this prints; all is kept\n"),
        (told, None, 0, ""),
        (lambda: print("told"), "all is kept", 0, ""),
        (interrupted, "all is kept", 130, "interrupted; all is kept\n"),
        (interrupted, None, 130, "interrupted\n"),
        (nowhere, None, 2, "error: cannot use 'no/where': No such file or directory\n"),
        (without_room, None, 2, "error: cannot write to standard output or a file: No space left"),
    ],
)
def test_how_commands_end_that_nobody_reads(monkeypatch, capsys, command, hint, code, message):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert exit_code(command, hint) == code
    errors = capsys.readouterr().err
    assert errors.startswith(message)
    assert errors.count("\n") == bool(message)


def test_a_pipe_to_somebody_else_may_break(monkeypatch, capsys):
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as read:
        monkeypatch.setattr(sys, "stdout", read)
        assert exit_code(another_pipe, "all is kept") == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_whoever_reads_may_stop_early():
    code, _, errors = shell("$PYTHON -m evokernels inspect adam --backend all | head -1")
    assert (code, errors) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_standard_output_that_takes_nothing():
    code, _, errors = shell("$PYTHON -m evokernels export adam > /dev/full")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: cannot write to standard output or a file: No space left")


def test_a_file_of_python_is_utf_8_whatever_the_terminal_has():
    code, text, errors = shell("$PYTHON -m evokernels export adam", PYTHONIOENCODING="ascii")
    assert (code, errors) == (0, "")
    assert "m ← " in text
