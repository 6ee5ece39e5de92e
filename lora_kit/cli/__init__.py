"""The command line: verbs of a few lines, each importing what it needs when it runs.

Exit codes: 0 good, 2 what was given is wrong, 3 the machine, 4 a verification failed, 130 on SIGINT, 143 on SIGTERM.
"""

from lora_kit.cli import (  # noqa: F401 - each adds its verb
    chat,
    check,
    combine,
    compare,
    convert,
    demo,
    doctor,
    eval,
    export,
    extract,
    follow,
    generate,
    init,
    inspect,
    keep,
    list,
    merge,
    parity,
    plan,
    predict,
    prepare,
    preview,
    push,
    resize,
    runs,
    serve,
    sign,
    sweep,
    train,
    verify,
)
from lora_kit.cli.app import app
from lora_kit.cli.main import main
from lora_kit.cli.verb_groups import group_verbs

group_verbs(app)

__all__ = ["app", "main"]
