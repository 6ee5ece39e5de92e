"""Read the files of others safely, write ours atomically. No module here knows what an adapter is."""
