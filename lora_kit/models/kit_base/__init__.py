"""The base model that comes with the package: its files, and the script that pretrained it."""
