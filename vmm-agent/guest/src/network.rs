//! The guest's one network link, as its kernel's command line says.
//!
//! ```text
//!   oc.net=ADDRESS/LENGTH,GATEWAY    once for IPv4 and once for IPv6
//!   oc.gateway-mac=MAC               the gateway's: nobody has to be asked where it is
//!   oc.dns=ADDRESS                   where to ask for names
//! ```
//!
//! All of it is the same for every guest of a host, so a clone finds it done. Who may be reached is decided by the host.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily as AddressFamilyOfSocket, MsgFlags, SockFlag, SockProtocol, SockType, recv, send,
        socket,
    },
};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};

const LINK: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Address, length of its network's prefix, gateway.
    addresses: Vec<(IpAddr, u8, IpAddr)>,
    gateway_mac: Option<[u8; 6]>,
    dns: Option<IpAddr>,
}

impl Plan {
    /// What cannot be read is left out.
    fn parse(command_line: &str) -> Self {
        let mut plan = Self::default();
        for word in command_line.split_whitespace() {
            match word.split_once('=') {
                Some(("oc.net", value)) => plan.addresses.extend(address(value)),
                Some(("oc.gateway-mac", value)) => plan.gateway_mac = mac(value),
                Some(("oc.dns", value)) => plan.dns = value.parse().ok(),
                _ => {}
            }
        }
        plan
    }
}

fn address(value: &str) -> Option<(IpAddr, u8, IpAddr)> {
    let (network, gateway) = value.split_once(',')?;
    let (address, length) = network.split_once('/')?;
    Some((address.parse().ok()?, length.parse().ok()?, gateway.parse().ok()?))
}

fn mac(value: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = value.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// Takes the link up. A guest without one, or that is told nothing, has no network.
///
/// # Errors
///
/// If the kernel refuses.
pub fn configure() -> io::Result<()> {
    let plan = Plan::parse(&fs::read_to_string("/proc/cmdline")?);
    if plan.addresses.is_empty() || !Path::new("/sys/class/net").join(LINK).exists() {
        return Ok(());
    }
    // No address of its own making, which nobody would let pass, and no routes that somebody tells.
    for (name, value) in [("addr_gen_mode", "1"), ("accept_ra", "0"), ("accept_redirects", "0")] {
        // A kernel may have no IPv6.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/{name}"), value);
    }
    // Anybody may ping.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    set_up(&plan)?;
    plan.dns.map_or(Ok(()), follow)
}

fn set_up(plan: &Plan) -> io::Result<()> {
    let kernel = Kernel::open()?;
    let index = if_nametoindex(LINK)?;
    kernel.tell(RouteNetlinkMessage::SetLink(
        LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build(),
    ))?;
    for &(address, length, gateway) in &plan.addresses {
        let mut own = match address {
            IpAddr::V4(address) => {
                AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, length).build()
            }
            IpAddr::V6(address) => {
                AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, length).build()
            }
        };
        // Nobody else is there who could have it.
        own.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        kernel.tell(RouteNetlinkMessage::NewAddress(own))?;
        if let Some(mac) = plan.gateway_mac {
            kernel.tell(RouteNetlinkMessage::NewNeighbour(pinned(index, gateway, mac)))?;
        }
        let route = match gateway {
            IpAddr::V4(gateway) => {
                RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).gateway(gateway).build()
            }
            IpAddr::V6(gateway) => {
                RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index).gateway(gateway).build()
            }
        };
        kernel.tell(RouteNetlinkMessage::NewRoute(route))?;
    }
    Ok(())
}

fn pinned(index: u32, address: IpAddr, mac: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    let (family, address) = match address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes =
        vec![NeighbourAttribute::Destination(address), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}

/// The kernel's side of netlink (rtnetlink(7)). Told what to do and asked nothing, it needs none of a client that reads: as
/// much code again as a fourth of this program.
struct Kernel(OwnedFd);

impl Kernel {
    fn open() -> io::Result<Self> {
        let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        Ok(Self(socket(AddressFamilyOfSocket::Netlink, kind.0, kind.1, kind.2)?))
    }

    fn tell(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // A header of 16 bytes, then an error of four: negative, or none (netlink(7), NLMSG_ERROR).
        match answer[..length].get(16..20) {
            Some(&[a, b, c, d]) => match i32::from_ne_bytes([a, b, c, d]) {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            },
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Has programs ask `dns` for names, unless somebody has told them otherwise.
fn follow(dns: IpAddr) -> io::Result<()> {
    let is_told = fs::read_to_string(RESOLV_CONF).is_ok_and(|text| !text.trim().is_empty());
    if is_told {
        return Ok(());
    }
    fs::write(RESOLV_CONF, format!("nameserver {dns}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read() {
        let line = "quiet oc.net=198.18.0.2/30,198.18.0.1 oc.net=fd00::2/64,fd00::1 oc.gateway-mac=02:6f:63:00:00:01 \
                    oc.dns=198.18.0.53 oc.net=nonsense psi=0";
        let plan = Plan::parse(line);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let wanted = [(ip("198.18.0.2"), 30, ip("198.18.0.1")), (ip("fd00::2"), 64, ip("fd00::1"))];
        assert_eq!(plan.addresses, wanted);
        assert_eq!(plan.gateway_mac, Some([2, 0x6f, 0x63, 0, 0, 1]));
        assert_eq!(plan.dns, Some(ip("198.18.0.53")));
        assert_eq!(Plan::parse("oc.gateway-mac=1:2 oc.dns=x oc.net=1.2.3.4,5"), Plan::default());
    }
}
