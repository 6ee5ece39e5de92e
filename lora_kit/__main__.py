"""`python -m lora_kit` is `lora-kit`."""

import sys

from lora_kit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
