"""From a file as people have it to rows that can be trained on."""
