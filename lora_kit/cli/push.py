"""`push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora_kit.cli.app import AsJson, Store, app
from lora_kit.cli.output import format_size, print_json, print_table
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.publishing.push import PushPlan


@app.command
def push(
    folder: str,
    /,
    *,
    repo: Annotated[str, Parameter(help="Repository of the hub: organization/name. It is made where it is not there.")],
    base: str | None = None,
    license: str | None = None,
    dataset: Annotated[
        list[str] | None, Parameter(negative="", help="Id on the hub of data that the card names; may be repeated.")
    ] = None,
    message: str = "",
    public: Annotated[bool, Parameter(negative="")] = False,
    replace: Annotated[bool, Parameter(negative="", help="Write over the files that are there.")] = False,
    dry_run: Annotated[bool, Parameter(negative="", help="List what would be sent, and send nothing.")] = False,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Push an adapter or a model to the hub, in one commit.

    Sent are weights, configs, tokenizer, record and card; no recipe, no report, no name of data, no path of this
    machine.

    Example: lora-kit push mine --repo organization/mine --dry-run

    Args:
        folder: An adapter (a folder or a name in the store), or a model that was merged or trained in every weight.
        base: Name of the base on the hub; by default the one that the folder names.
        license: Id of the license on the hub, for the card.
        message: Of the commit.
        public: Make a new repository public; otherwise it is private.
    """
    from lora_kit.adapter.store import find_adapter
    from lora_kit.publishing.commit import push as send
    from lora_kit.publishing.published_folder import is_model_folder
    from lora_kit.publishing.push import plan_push

    path = Path(folder) if is_model_folder(Path(folder)) else find_adapter(folder, store=store)
    plan = plan_push(path, repo, base=base, license=license, datasets=dataset or ())
    if dry_run:
        _show_plan(plan, json=json)
        return
    report = send(plan, visibility="public" if public else "private", replace=replace, message=message)
    if json:
        print_json(report.to_json())
        return
    rows = [("pushed", report.url), ("files", f"{report.files}, {format_size(report.bytes)}")]
    print_table(("", ""), rows + [("removed", name) for name in report.removed])


def _show_plan(plan: PushPlan, *, json: bool) -> None:
    """Print what a push would send."""
    if json:
        print_json({"repository": plan.repository, "base": plan.base, "files": plan.sizes, "left_out": plan.left_out})
        return
    print_table(("would be sent", "size"), [(name, format_size(size)) for name, size in sorted(plan.sizes.items())])
    print_table(("left out",), [(name,) for name in plan.left_out])
