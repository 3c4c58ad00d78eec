from tests.unit.hub.fixtures import hub

__all__ = ["hub"]
