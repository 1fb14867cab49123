"""Stands where launch/label.py would; the study of these tests has no arm that reads labels."""
