"""The student writes: sampling, generation with a key-value cache, records and replays."""
