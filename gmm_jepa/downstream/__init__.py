"""Downstream tasks on frozen features, after SUPERB: transcripts, emotions, slots."""
