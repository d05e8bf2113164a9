"""The routers of an ingestor: one is asked until it fails, then the next."""

from collections.abc import Sequence

from headrace.core.tenancy import TENANT_HEADER
from headrace.errors import HeadraceError, NotReady, UnknownModel
from headrace.runtime.channels import Channels, translate_errors
from headrace.v1 import router_pb2, router_pb2_grpc

MODELS_TIMEOUT_S = 2.0


class Routers:
    """Owns which router is asked.

    Args:
        addresses: host:port of each, at least one.
        channels: Connections to them.
    """

    def __init__(self, addresses: Sequence[str], channels: Channels) -> None:
        self._addresses = tuple(addresses)
        self._channels = channels
        self._place = 0

    @property
    def address(self) -> str:
        """The one that is asked now."""
        return self._addresses[self._place]

    def avoid(self, address: str) -> None:
        """Ask another one, if this is the one that is asked now."""
        if address == self.address:
            self._place = (self._place + 1) % len(self._addresses)

    def stub(self, address: str) -> "router_pb2_grpc.RouterServiceAsyncStub":
        """Return the stub of a router.

        Raises:
            PeerFailed: this process is leaving.
        """
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(self._channels.get(address))
        return stub

    async def model(self, name: str) -> router_pb2.ModelCard:
        """Return a model by name; empty is the first that is served.

        Raises:
            UnknownModel: it is not served.
            NotReady: no router can tell, or no model is served yet.
        """
        for _ in self._addresses:
            address = self.address
            try:
                async with translate_errors(address):
                    request = router_pb2.ListModelsRequest()
                    found = await self.stub(address).ListModels(request, timeout=MODELS_TIMEOUT_S)
            except HeadraceError:
                self.avoid(address)
                continue
            for card in found.models:
                if name in ("", card.name):
                    return card
            if found.models:
                names = ", ".join(repr(card.name) for card in found.models)
                raise UnknownModel(f"model {name!r} is not served here; served is {names}", field="model")
            raise NotReady("no worker has been met yet: retry shortly", retry_after_s=1.0)
        raise NotReady("no router can be reached: retry shortly", retry_after_s=1.0)


def metadata_of(tenant: str) -> tuple[tuple[str, str], ...]:
    """Return what goes with the calls for a tenant."""
    return ((TENANT_HEADER, tenant),)


def is_movable(error: HeadraceError) -> bool:
    """Return whether another attempt, or another router, may do what this one could not."""
    return error.grpc_status == "UNAVAILABLE"
