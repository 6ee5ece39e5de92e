"""Reading files of others without harm, and writing folders all or nothing."""

from lora_kit.files.reading import (
    buffer,
    exists,
    fill,
    folder_exists,
    opened,
    printable,
    read_json,
    read_regular,
    read_text,
)
from lora_kit.files.writing import Owned, check_output, check_path, sole_writer, staged, sync_folder, write_folder

__all__ = [
    "Owned",
    "buffer",
    "check_output",
    "check_path",
    "exists",
    "fill",
    "folder_exists",
    "opened",
    "printable",
    "read_json",
    "read_regular",
    "read_text",
    "sole_writer",
    "staged",
    "sync_folder",
    "write_folder",
]
