"""Every suite that fits this machine, each in a process of its own; finished cells are skipped.

    python -m benchmarks.speed                       # all
    python -m benchmarks.speed step --device cuda    # some; each is also a module of its own with more options

Not among them: ``large`` (a 7B shape on a CPU, 19 GB) and ``accounting`` (computed, not measured).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# Modules of this package that understand --device, and whether they skip finished cells (and understand --fresh).
SUITES = {"scoring": False, "probing": True, "step": True, "switching": True, "convergence": True}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--fresh", action="store_true", help="measure again what is finished for this commit")
    options = parser.parse_args(arguments)
    for name in options.suites or SUITES:
        print(f"{name}:", flush=True)
        passed_on = ["--device", options.device, *(["--fresh"] if options.fresh and SUITES[name] else [])]
        subprocess.run([sys.executable, "-m", f"benchmarks.speed.{name}", *passed_on], check=True)


if __name__ == "__main__":
    main()
