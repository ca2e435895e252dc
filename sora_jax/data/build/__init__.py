"""Raw videos to shards of clips, stage by stage."""
