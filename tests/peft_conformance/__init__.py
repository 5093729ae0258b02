"""PEFT's own test-suite, run with Model-Dowser rows beside those of its built-in methods.

    python tests/peft_conformance/run.py            # a representative part, a few minutes on two cores
    python tests/peft_conformance/run.py --full     # every row of every file

PEFT tests each of its methods by listing it in the tables of a shared suite. A third-party method is not in
those tables, so it is never asked whether it merges in float16, survives ``delete_adapter``, or loads with
``low_cpu_mem_usage``. Here it is asked: the suite of the installed PEFT release runs unmodified, and a pytest
plugin adds our rows wherever PEFT lists a comparable method of its own.

    run.py       fetches the suite, prepares a scratch folder, starts pytest, checks that rows were really added
    plugin.py    pytest hooks: add rows, select them, leave out what cannot run here
    rows.py      what our rows say, for each shape of table
    replay.py    PEFT tests written for LoRA alone that say something about any method, replayed with ours
    hub.py       a Hugging Face cache of tiny random models, so that nothing is downloaded
"""
