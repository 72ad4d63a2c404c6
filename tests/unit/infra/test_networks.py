import pytest

from authd.infra.networks import network_of, networks_of


@pytest.mark.parametrize(
    ("address", "wide", "narrow"),
    [
        ("192.0.2.77", "192.0.2.0/24", "192.0.2.77"),
        ("::ffff:192.0.2.77", "192.0.2.0/24", "192.0.2.77"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1::/48", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/48", "fe80::/64"),
        ("", "", ""),
        ("no address", "no address", "no address"),
    ],
)
def test_an_address_has_a_narrow_and_a_wide_network(address: str, wide: str, narrow: str) -> None:
    assert networks_of(address) == (wide, narrow)
    assert network_of(address) == narrow
