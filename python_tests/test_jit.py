"""Rules compiled where they run: once for a structure, kept on disk, never at anybody's mercy."""

import concurrent.futures
import gc
import io
import multiprocessing
import os
import pathlib
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from bound import HOST_BACKENDS, bound, everything, own, same_bits

from evokernels import FusedEvolvedOptimizer, explain, zoo
from evokernels.compiler.evaluate import run_program
from evokernels.compiler.lower import lower
from evokernels.compiler.terms import genome_scalars
from evokernels.errors import BackendError
from evokernels.kernels import c_compiler, cache, native, own_kernels
from evokernels.kernels.c_compiler import CCompiler
from evokernels.kernels.plan import Numbers
from evokernels.terms import average, g, m, tanh, v

RULE = own(tanh(g) * 0.5 + average(g, 0.5), m)
OTHER = own(tanh(g) + average(g * v, 0.5))
CPU = HOST_BACKENDS["cpu"]
DEVICE = torch.device("cpu")

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and temporary files where they can be counted."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("EVOKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(cache, "_told", set())
    own_kernels._known.cache_clear()
    yield tmp_path / "cache" / "kernels"
    own_kernels._known.cache_clear()
    assert list((tmp_path / "temporary").glob("evokernels*")) == []


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled from now on."""
    calls = []
    compile = CCompiler.shared_library

    def counting(*args):
        calls.append(args)
        return compile(*args)

    monkeypatch.setattr(CCompiler, "shared_library", counting)
    return calls


def forget():
    """As in another process."""
    own_kernels._known.cache_clear()


def step(genome, dtype=torch.float32, state=None, backend=CPU):
    """Parameter and moments after a step from somewhere."""
    start = torch.linspace(-2, 2, 1000).to(dtype)
    tensor = bound(genome, start.clone(), state)
    rule = lower(genome)
    numbers = Numbers(rule.program, rule.numbers(**genome_scalars(genome, 1)), 1)
    backend.bind([tensor]).run([start.flip(0)], [0], [numbers])
    return tensor


def is_right(tensor):
    expected = step(RULE, tensor.parameter.dtype, backend=HOST_BACKENDS["eager"])
    pairs = zip(everything(tensor), everything(expected), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


# what is compiled, and when


def test_numbers_compile_nothing(compiled):
    for beta in (0.5, 0.6, 0.7):
        step(own(tanh(g) * beta + average(g, beta), m))
    assert len(compiled) == 1
    step(OTHER)
    assert len(compiled) == 2
    step(zoo.adamw)  # a cover
    assert len(compiled) == 2


def test_construction_compiles_and_steps_do_not(compiled):
    parameter = torch.ones(3, requires_grad=True)
    optimizer = FusedEvolvedOptimizer([parameter], RULE)
    assert len(compiled) == 1
    parameter.grad = torch.ones(3)
    for _ in range(3):
        optimizer.step()
    FusedEvolvedOptimizer([parameter], RULE)
    assert len(compiled) == 1


def test_other_processes_read_from_disk(compiled, folder):
    first = step(RULE)
    forget()
    assert all(map(same_bits, everything(step(RULE)), everything(first)))
    assert len(compiled) == 1
    (entry,) = folder.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_pair_of_dtypes_is_compiled_once(compiled, dtype, state):
    step(RULE, dtype, state)
    step(RULE, dtype, state)
    assert len(compiled) == 1


def test_float64_against_the_interpreter():
    tensor = step(OTHER, torch.float64)
    rule = lower(OTHER)
    start = np.linspace(-2, 2, 1000)
    inputs = {**dict.fromkeys(rule.program.state, np.zeros(1000)), "p": start, "g": start[::-1]}
    inputs = {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}
    start = torch.linspace(-2, 2, 1000).to(torch.float64).numpy()
    inputs.update(p=start, g=start[::-1])
    exact = run_program(rule.program, inputs, rule.numbers(**genome_scalars(OTHER, 1)))
    np.testing.assert_allclose(tensor.parameter.numpy(), exact["p"], rtol=1e-14, atol=1e-15)
    for name, moment in tensor.moments.items():
        np.testing.assert_allclose(moment.numpy(), exact[name], rtol=1e-14, atol=1e-15)


def test_everything_decisive_counts(compiled, tmp_path, monkeypatch):
    """Another compiler, another of its versions, other instructions, another source."""
    compiler = tmp_path / "mycc"
    compiler.write_text('#!/bin/sh\nexec cc "$@"\n')
    compiler.chmod(0o755)
    step(RULE)
    monkeypatch.setenv("CC", str(compiler))
    step(RULE)
    assert len(compiled) == 2
    forget()
    step(RULE)
    assert len(compiled) == 2
    os.utime(compiler, (1, 1))
    forget()
    step(RULE)
    assert len(compiled) == 3
    monkeypatch.setenv("CC", f"{compiler} -DANYTHING")
    step(RULE)
    assert len(compiled) == 4
    monkeypatch.setattr(native, "instruction_set", lambda: "x86-64")
    forget()
    step(RULE)
    assert len(compiled) == 5
    _, _, options = compiled[-1]
    assert "-march=x86-64" in options
    include = own_kernels.with_included
    monkeypatch.setattr(own_kernels, "with_included", lambda *args: include(*args) + "\n/**/")
    forget()
    step(RULE)
    assert len(compiled) == 6


def test_it_is_explained():
    told = io.StringIO()
    explain(RULE, file=told)
    assert f"cpu: compiled here by cc, {native.instruction_set()}" in told.getvalue()


# what is on disk


def another_library(content, tmp_path):
    """A good library that is not the one whose digest is in front."""
    source, library = tmp_path / "evil.c", tmp_path / "evil.so"
    ran = tmp_path / "evil ran"
    source.write_text(
        f"#include <stdio.h>\n__attribute__((constructor)) static void run(void) "
        f'{{ fopen("{ran}", "w"); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return content[:32] + library.read_bytes()


DAMAGES = {
    "cut": lambda content, _: content[:-100],
    "empty": lambda content, _: b"",
    "a bit": lambda content, _: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "another library": another_library,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_run(compiled, folder, tmp_path, damage):
    step(RULE)
    (entry,) = folder.iterdir()
    entry.write_bytes(DAMAGES[damage](entry.read_bytes(), tmp_path))
    forget()
    assert is_right(step(RULE))
    assert len(compiled) == 2
    assert not (tmp_path / "evil ran").exists()


def test_a_folder_that_others_can_write_to_is_not_used(compiled, folder, tmp_path):
    step(RULE)
    (entry,) = folder.iterdir()
    content = another_library(b"", tmp_path)
    entry.write_bytes(cache._DIGEST(content).digest() + content)  # all is right but the owner
    folder.chmod(0o777)
    forget()
    with pytest.warns(RuntimeWarning, match="others may write there"):
        assert is_right(step(RULE))
    assert len(compiled) == 2
    assert not (tmp_path / "evil ran").exists()


def test_a_folder_of_somebody_else_is_not_used(compiled, folder, monkeypatch):
    step(RULE)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    forget()
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert is_right(step(RULE))
    assert len(compiled) == 2


# compilers that fail


def script(folder, text):
    """A compiler that notes each call, and does what the text says."""
    path = folder / "broken-cc"
    path.write_text(f"#!/bin/sh\necho called >> {folder}/calls\n{text}\n")
    path.chmod(0o755)
    return str(path)


FAILURES = {
    # what it does, what it is said to have done
    "error": (
        "touch $TMPDIR/evokernels-left; echo 'rule.c:3: error: no such thing' >&2; exit 3",
        "exit code 3; .*no such thing",
    ),
    "killed": ("kill -9 $$", "killed by signal 9"),
    "slow": ("sleep 100", "it has not finished after 0.3 seconds"),
    "slow children": ("sleep 100 & wait", "it has not finished after 0.3 seconds"),
    "nothing": ("exit 0", "it makes no file, and says that all is well"),
    "floods": ("yes 'error: no such thing' | head -c 10000000; exit 1", "exit code 1; error: no"),
    "junk": (
        'while [ "$1" != -o ]; do shift; done; echo junk > "$2"',
        "cannot be loaded .*set TMPDIR",
    ),
    "no symbol": (
        'while [ "$1" != -o ]; do shift; done; echo | cc -shared -x c - -o "$2"',
        "lacks a function .*evk_own_float32_float32",
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_compiler_that_fails_is_told_once(kind, tmp_path, monkeypatch):
    text, said = FAILURES[kind]
    monkeypatch.setenv("CC", script(tmp_path, text))
    monkeypatch.setattr(c_compiler, "_TIMEOUT", 0.3)
    began = time.monotonic()
    reason = CPU.why_not(lower(RULE).program, DEVICE, torch.float32)
    assert time.monotonic() - began < 5
    assert (tmp_path / "calls").read_text() == "called\n"
    with pytest.raises(BackendError, match=f"(?s)^backend 'cpu': .*{said}"):
        FusedEvolvedOptimizer([torch.ones(3, requires_grad=True)], RULE, backend="cpu")
    with pytest.warns(RuntimeWarning, match=f"(?s)slow 'eager' backend .*{said}"):
        FusedEvolvedOptimizer([torch.ones(3, requires_grad=True)], RULE)
    assert (tmp_path / "calls").read_text() == "called\n"  # not tried again
    if kind in ("error", "killed", "slow"):
        assert "tanh(" in reason  # which rule
    monkeypatch.delenv("CC")
    monkeypatch.setattr(c_compiler, "_TIMEOUT", 60)
    assert is_right(step(RULE))  # another compiler is


def test_what_a_slow_compiler_has_started_ends(tmp_path, monkeypatch):
    text = f"sleep 100 & echo $! > {tmp_path}/child; wait"
    monkeypatch.setenv("CC", script(tmp_path, text))
    monkeypatch.setattr(c_compiler, "_TIMEOUT", 0.5)
    assert "not finished" in CPU.why_not(lower(RULE).program, DEVICE, torch.float32)
    child = pathlib.Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("it still runs")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "PATH",
            "",
            "no C compiler .*none of cc, gcc, clang is on the PATH; install one, or set CC",
        ),
        ("CC", "nowhere-cc -O1", "CC is 'nowhere-cc -O1', and there is no such command"),
        ("CC", " ", "CC is ' ', and there is no such command"),
        ("CC", "'open", 'CC is "\'open", and there is no such command'),
    ],
)
def test_without_a_compiler(monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=said):
        FusedEvolvedOptimizer([torch.ones(3, requires_grad=True)], RULE, backend="cpu")
    with pytest.warns(RuntimeWarning, match=f"slow 'eager' backend .*{said}"):
        FusedEvolvedOptimizer([torch.ones(3, requires_grad=True)], RULE)
    told = io.StringIO()
    explain(RULE, file=told)
    assert "backend  eager" in told.getvalue()
    assert "not cpu: " in told.getvalue()
    FusedEvolvedOptimizer([torch.ones(3, requires_grad=True)], zoo.adam, backend="cpu")


def test_a_compiler_may_have_options(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc -pipe")
    assert is_right(step(RULE))
    assert CPU.kernel(lower(RULE).program, torch.float32).startswith("compiled here by cc -pipe, ")


@pytest.mark.parametrize("option", ["-ffast-math", "-funsafe-math-optimizations"])
def test_a_compiler_may_not_round_otherwise(monkeypatch, option):
    """Nor make the whole process flush subnormal numbers."""
    expected = step(RULE, torch.float64)
    monkeypatch.setenv("CC", f"cc {option}")
    assert all(map(same_bits, everything(step(RULE, torch.float64)), everything(expected)))
    assert torch.tensor([1e-40]) * 1 > 0


def test_a_command_of_any_bytes(monkeypatch, tmp_path):
    compiler = tmp_path / os.fsdecode(b"\xff cc")
    compiler.symlink_to(shutil.which("cc"))
    monkeypatch.setenv("CC", shlex.quote(str(compiler)))
    assert is_right(step(RULE))


def test_what_cannot_be_loaded_is_not_kept(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("CC", script(tmp_path, FAILURES["junk"][0]))
    assert "cannot be loaded" in CPU.why_not(lower(RULE).program, DEVICE, torch.float32)
    assert not folder.exists()


def test_a_full_disk_is_a_reason(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/tmp")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    reason = CPU.why_not(lower(RULE).program, DEVICE, torch.float32)
    assert "No space left on device" in reason


def test_a_compiler_may_leave_something_running(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, 'sleep 100 & echo $! > "$0.child"; exec cc "$@"'))
    began = time.monotonic()
    assert is_right(step(RULE))
    assert time.monotonic() - began < 60
    os.kill(int((tmp_path / "broken-cc.child").read_text()), signal.SIGKILL)


def test_ctrl_c_ends_the_compiler(tmp_path, monkeypatch):
    child = tmp_path / "child"
    monkeypatch.setenv("CC", script(tmp_path, f"echo $$ > {child}; sleep 100"))

    sleep = time.sleep

    def interrupted(seconds):
        if child.exists() and child.read_text():
            raise KeyboardInterrupt  # as the signal does, which a shell may have switched off
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(RULE)
    monkeypatch.setattr(time, "sleep", sleep)
    assert not pathlib.Path("/proc", child.read_text().strip()).exists()
    monkeypatch.delenv("CC")
    assert is_right(step(RULE))


# many at once


def test_threads_compile_once(compiled):
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        return step(OTHER if i % 2 else RULE)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len(compiled) == 2
    assert all(is_right(tensor) for tensor in results[::2])
    for tensor in results[2:]:
        first = results[0] if tensor.moments.keys() == results[0].moments.keys() else results[1]
        assert all(map(same_bits, everything(tensor), everything(first)))


def compile_at(barrier, results):
    barrier.wait()
    results.put(is_right(step(RULE)))


def test_processes_that_compile_at_once(folder):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=compile_at, args=(barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 3
    assert [results.get() for _ in processes] == [True] * 3
    assert len(list(folder.iterdir())) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork
def test_a_forked_process_compiles_though_a_thread_did():
    with own_kernels._one_at_a_time:
        child = os.fork()
        if not child:
            os._exit(not own_kernels._one_at_a_time.acquire(blocking=False))
    assert os.waitpid(child, 0)[1] == 0


# what is loaded


def loaded():
    return pathlib.Path("/proc/self/maps").read_text().count("rule.so")


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="there is no /proc")
def test_kernels_stay_as_long_as_a_plan_needs_them():
    gc.collect()
    before = loaded()
    rule = lower(RULE)
    tensor = bound(RULE, torch.ones(100))
    plan = CPU.bind([tensor])
    assert loaded() > before
    forget()
    gc.collect()
    numbers = Numbers(rule.program, rule.numbers(**genome_scalars(RULE, 1)), 1)
    plan.run([torch.ones(100)], [0], [numbers])
    assert (tensor.parameter != 1).all()
    del plan
    gc.collect()
    assert loaded() == before
