"""How the package lies on disk, is found by torch, and leaves ``import transformers`` alone; each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import spectral_compile

pytestmark = pytest.mark.xdist_group("package")  # the wheels are built in the source tree
ROOT = Path(__file__).parents[1]
SITE = sysconfig.get_path("purelib")

LAYOUT = """
import spectral_compile.codec, spectral_compile.kernels.append.reference, spectral_compile.passes.attention as attention
print(spectral_compile.__file__, spectral_compile.kernels.append.reference.__file__, attention.__file__, sep="\\n")
"""
TRANSFORMERS = """
import transformers
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
import kernels
print(is_kernels_available(), kernels.__file__)
"""
PROFILE = """
from spectral_compile import SpectralConfig
print(len(SpectralConfig.parse({"profile": "smollm2-135m-instruct"}).profile.loss))
"""
IMPORTED = """
import sys
import spectral_compile
slow = ("torch._inductor", "torch._inductor.compile_fx", "torch._dynamo", "transformers", "typer", "rich")
print([name for name in slow if name in sys.modules])
"""
BACKEND = """
import torch
print("spectral" in torch._dynamo.list_backends(exclude_tags=()), torch._dynamo.lookup_backend("spectral").__module__)
"""


def python(code: str, cwd: Path, *folders: Path) -> subprocess.CompletedProcess:
    """Run ``code`` in ``cwd`` with ``folders`` before this environment's site-packages, whose editable install is left out."""
    prelude = f"import site\nfor folder in {[*map(str, folders)]}: site.addsitedir(folder)\n"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*folders, SITE)))}
    return subprocess.run([sys.executable, "-S", "-c", prelude + code], cwd=cwd, env=env, capture_output=True, text=True)


def output(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def pip(*arguments: Path | str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave nothing behind in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("spectral_compile", "kernels", "passes", "profiles"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", source, "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", folder)
    return folder


def sources(root: Path) -> list[str]:
    return [str(root / name) for name in ("spectral_compile/__init__.py", "kernels/append/reference.py", "passes/attention.py")]


def test_an_uninstalled_checkout_imports_from_its_root() -> None:
    assert output(python(LAYOUT, ROOT)) == sources(ROOT)


def test_an_editable_install_imports_from_the_checkout(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip("install", "--editable", source, "--target", target)
    assert output(python(LAYOUT, tmp_path, target)) == sources(source)


def test_a_wheel_imports_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    package = installed / "spectral_compile"
    files = output(python(LAYOUT, tmp_path, installed))
    assert files == [str(package / name) for name in ("__init__.py", "kernels/append/reference.py", "passes/attention.py")]


def test_the_wheel_puts_nothing_but_spectral_compile_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"spectral_compile"}


def test_every_module_of_the_checkout_is_in_the_wheel(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    modules = [path.relative_to(source) for path in source.rglob("*.py") if "build" not in path.parts]
    assert packed == {str(p if p.parts[0] == "spectral_compile" else Path("spectral_compile") / p) for p in modules}


def test_the_wheel_is_typed_and_has_the_profiles(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    profiles = {f"spectral_compile/profiles/{path.name}" for path in (ROOT / "profiles").iterdir()}
    assert profiles and packed >= profiles | {"spectral_compile/py.typed"}


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_a_profile_is_found_by_its_name(where: str, installed: Path, tmp_path: Path) -> None:
    found = python(PROFILE, tmp_path, ROOT if where == "checkout" else installed)
    assert output(found) == ["30"]


def test_importing_the_package_imports_neither_compilers_nor_transformers(tmp_path: Path) -> None:
    """They take seconds, which nobody should wait for who only asks for an option."""
    assert output(python(IMPORTED, tmp_path, ROOT)) == ["[]"]


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_torch_can_log_the_package_without_importing_more(
    where: str, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``TORCH_LOGS`` makes torch import a package and those in it; in a checkout it found this one in itself, without end."""
    monkeypatch.setenv("TORCH_LOGS", "+spectral_compile")
    assert output(python(IMPORTED, tmp_path, ROOT if where == "checkout" else installed)) == ["[]"]


def test_every_public_name_is_there() -> None:
    assert "SpectralWarning" in spectral_compile.__all__
    assert all(hasattr(spectral_compile, name) for name in spectral_compile.__all__)


def test_kernels_and_passes_are_no_regular_packages() -> None:
    """transformers imports a top-level package named ``kernels`` when it finds one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()


def test_transformers_imports_from_the_root_without_a_kernels_package() -> None:
    assert output(python(TRANSFORMERS, ROOT)) == ["False None"]


def test_transformers_imports_from_the_root_beside_an_installed_kernels_package(tmp_path: Path) -> None:
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\nkernels-0.1.0.dist-info/METADATA,,\n")
    assert output(python(TRANSFORMERS, ROOT, tmp_path)) == [f"False {package / '__init__.py'}"]


def test_torch_finds_the_backend_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    assert output(python(BACKEND, tmp_path, installed)) == ["True spectral_compile.backend"]


def test_asking_for_the_backend_without_giving_it_a_graph_warns_at_exit(installed: Path, tmp_path: Path) -> None:
    done = python('import torch; torch.compile(torch.nn.Linear(2, 2), backend="spectral")', tmp_path, installed)
    assert done.returncode == 0
    assert 'call model.compile(backend="spectral")' in done.stderr


def test_giving_the_backend_a_graph_does_not_warn_at_exit(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
torch.compile(lambda x: x + 1, backend="spectral", options={"inner": "eager"})(torch.ones(1))
"""
    done = python(code, tmp_path, installed)
    assert done.returncode == 0
    assert "model.compile" not in done.stderr
