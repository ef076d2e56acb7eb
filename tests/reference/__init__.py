"""Independent float64 references of SOAP, KL-Shampoo and KL-SOAP, in numpy alone."""

from tests.reference.kl import ReferenceKLShampoo, ReferenceKLSOAP
from tests.reference.soap import ReferenceSOAP

__all__ = ["ReferenceKLSOAP", "ReferenceKLShampoo", "ReferenceSOAP"]
