"""Run PEFT's own test-suite on Model-Dowser.

Arguments that are not listed below go to pytest, which runs in a folder that has the suite in ``peft_tests/``:
``run.py --full peft_tests/test_mixed.py -x``. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

SUITE = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_config",
    "test_low_level_api",
    "test_tuners_utils",
    "test_initialization",
    "test_auto",
    "test_helpers",
    "test_mapping",
    "test_other",
    "test_token_classification_qa",
    "test_mixed",
)

QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every model and row, not a representative part")
    parser.add_argument("--baseline", action="store_true", help="PEFT's own methods instead of ours")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, packed or unpacked")
    parser.add_argument("--workers", type=int, default=2, help="parallel test processes")
    options, pytest_arguments = parser.parse_known_args()

    with tempfile.TemporaryDirectory(prefix="peft-conformance-") as scratch:
        scratch_dir = Path(scratch)
        suite = unpack_tests(options.sdist or download_sdist(scratch_dir), scratch_dir)
        environment = offline_environment(scratch_dir)
        subprocess.run(
            [sys.executable, "-m", "peft_conformance.hub", *(["--baseline"] if options.baseline else [])],
            env=environment | QUIET,
            check=True,
        )
        command = [sys.executable, "-m", "pytest", "-c", str(suite.parent / "pytest.ini"), "-q", "--disable-warnings"]
        command += ["-p", "peft_conformance.plugin", "-p", "no:cacheprovider", "-n", str(options.workers)]
        command += [] if options.full else ["--quick"]
        command += ["--baseline"] if options.baseline else []
        command += pytest_arguments
        if not any(argument.endswith(".py") or ".py::" in argument for argument in pytest_arguments):
            command += [f"{suite.name}/{name}.py" for name in SUITE]
        return subprocess.run(command, cwd=suite.parent, env=environment).returncode


def download_sdist(folder: Path) -> Path:
    """The source distribution of the PEFT release that is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"peft=={version('peft')}"], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """Copy the tests of a source distribution to ``folder/peft_tests``, as a package: they import each other."""
    if sdist.is_file():
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        sdist = next(path for path in folder.glob("peft-*") if path.is_dir())
    suite = folder / "peft_tests"
    shutil.copytree(sdist / "tests", suite)
    (suite / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return suite


def offline_environment(folder: Path) -> dict[str, str]:
    """Variables under which Hugging Face libraries see nothing but ``folder/hub``."""
    here = Path(__file__).resolve().parent
    path = [str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


if __name__ == "__main__":
    sys.exit(main())
