"""`python -m lora_kit` is `lora-kit`."""

import os
import sys

from lora_kit.cli.main import main

if __name__ == "__main__":
    code = main()
    if code and "RANK" in os.environ:
        # At the end of Python torch may wait without an end for a process that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
