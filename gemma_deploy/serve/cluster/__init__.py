"""Artifacts on actors of a Ray cluster: replicas of one, or the stages of one that is divided by layers."""
