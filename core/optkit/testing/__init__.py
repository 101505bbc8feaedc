"""What authors of plugins test with: checks, and fakes that keep state."""

from optkit.testing.backends import check_backend
from optkit.testing.batching import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit.testing.sessions import ScriptedSession

__all__ = ["FakeMemory", "FakeRequest", "FakeSequence", "ScriptedSession", "check_backend", "decoding"]
