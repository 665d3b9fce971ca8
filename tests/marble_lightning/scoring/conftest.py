"""Retries without long pauses."""

from __future__ import annotations

import time

import pytest


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    pause = time.sleep
    monkeypatch.setattr("marble_lightning.scoring.failures.time.sleep", lambda seconds: pause(min(seconds, 0.01)))
