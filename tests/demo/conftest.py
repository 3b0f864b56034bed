import pytest

from sora_fast.demo.detector import DigitDetector


@pytest.fixture(scope="session")
def detector() -> DigitDetector:
    return DigitDetector()
