"""An accountant: Opacus' PRV (Gopi, Lee, Wutschitz 2021), which knows Gaussian releases only."""

from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.privacy_accountant import PrivacyAccountant
from opacus.accountants import PRVAccountant

from sapf_ray.privacy.accountant_table import ACCOUNTANTS, Accountant
from sapf_ray.privacy.accountants import ADJACENCY


class Prv(PrivacyAccountant):
    def __init__(self) -> None:
        super().__init__(ADJACENCY)
        self._prv = PRVAccountant()

    def _maybe_compose(self, event, count, do_compose):
        sampled = isinstance(event, PoissonSampledDpEvent)
        release = event.event if sampled else event
        if not isinstance(release, GaussianDpEvent):
            return self.CompositionErrorDetails(event, "not a Gaussian release")
        if do_compose:
            rate = event.sampling_probability if sampled else 1.0
            self._prv.history.append((release.noise_multiplier, rate, count))
        return None

    def get_epsilon(self, target_delta: float) -> float:
        return float(self._prv.get_epsilon(target_delta))


ACCOUNTANTS["prv"] = Accountant(title="PRV", make=lambda interval: Prv())
