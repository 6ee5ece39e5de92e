"""Files of others read safely, files of ours written atomically. No file here knows what an adapter is."""
