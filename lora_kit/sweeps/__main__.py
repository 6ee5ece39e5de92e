"""`python -m lora_kit.sweeps FOLDER PARENT`: a worker process of a sweep."""

import sys

from lora_kit.sweeps.worker import run_worker_process

if __name__ == "__main__":
    sys.exit(run_worker_process(*sys.argv[1:]))
