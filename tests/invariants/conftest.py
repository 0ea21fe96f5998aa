"""The model of small SFT cases, and features of it."""

from __future__ import annotations

from sft.case_fixtures import features as features
from sft.case_fixtures import model as model
