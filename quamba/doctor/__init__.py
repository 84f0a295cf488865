"""What is wrong with a model: its files read tensor by tensor, and a short run of it."""

from quamba.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
