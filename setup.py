"""Build: the compiler renders the cover kernels, the system's C compiler builds them.

The result is one plain shared library, evokernels/kernels/libevokernels.so, loaded with ctypes:
no Python and no torch headers, so that one build serves every version of both.
"""

import glob
import pathlib
import sys
import types

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent

# The compiler is needed before the package is there to import, and without torch: an empty
# stand-in for the package lets `evokernels.compiler` load and leaves evokernels/__init__.py alone.
_package = types.ModuleType("evokernels")
_package.__path__ = [str(ROOT / "evokernels")]
sys.modules["evokernels"] = _package

from evokernels.compiler.render_c import C_FLAGS, STORED, render_covers  # noqa: E402


class BuildKernels(build_ext):
    """Render one C file for each way of storing parameters and moments, then compile as usual."""

    def build_extension(self, ext: Extension) -> None:
        """Add the generated sources and build the library."""
        generated = pathlib.Path(self.build_temp) / "generated"
        generated.mkdir(parents=True, exist_ok=True)
        for dtype, state in STORED:
            source = generated / f"covers_{dtype}_{state}.c"
            source.write_text(render_covers(dtype, state))
            ext.sources.append(str(source))
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """A plain library name: nothing in it depends on the Python version."""
        return str(pathlib.Path(*fullname.split(".")).with_suffix(".so"))


native = Extension(
    "evokernels.kernels.libevokernels",
    sources=[
        f"csrc/{name}.c"
        for name in (
            *("runtime", "staging", "random", "noise", "perturb", "squares", "look"),
            *("layers", "flatten", "norm", "convolution", "batches", "perceptron"),
        )
    ],
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("evokernels/compiler/*.py")),
    include_dirs=["csrc"],
    libraries=["m"],
    extra_compile_args=[
        *C_FLAGS,
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror=vla",
        "-Wno-psabi",  # vectors are passed between functions of one file alone
    ],
    extra_link_args=["-fopenmp"],
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildKernels})
