"""Offline quantization: a checkpoint and a plan make a directory that other engines read too."""
