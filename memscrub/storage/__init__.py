"""Bytes on disk: checkpoints, shards, partial directories, patches, conversions; knows no policy."""
