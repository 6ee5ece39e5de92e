"""The programs that read our files, run for real: `python -m tests.programs`, or `make test-programs`.

Each program lives in a virtual environment of its own under `.programs/`. `cases` writes tiny bases, adapters, what is
exported of them and the logits that our own bank computes; a script of `readers/` runs inside each environment and
writes the logits that the program computes. `pytest` runs no program; `test_checks.py` holds what judges them.
"""
