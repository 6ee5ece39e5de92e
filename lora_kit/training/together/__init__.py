"""Several trainings over one base: each adapter's Trainer as if alone, the frozen layers computed for all at once."""
