"""What authors of plugins test with: fakes that keep state."""

from optkit.testing.batching import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit.testing.sessions import ScriptedSession

__all__ = ["FakeMemory", "FakeRequest", "FakeSequence", "ScriptedSession", "decoding"]
