//! Names and addresses: which are the same for every VM, and which tell one from another.
//!
//! Every guest has the same address, gateway and MAC, so that a clone goes on with what it finds in its memory. What is told
//! apart is told apart behind its namespace. All IPv4 addresses are of the block for benchmarks (RFC 2544), which no network
//! that anybody wants to reach uses, all IPv6 ones of one unique local prefix (RFC 4193); both are masqueraded at each
//! border, so what two agents have alike never meets.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

/// Where namespaces are named, as for `ip netns` (ip-netns(8)).
pub const NAMESPACES: &str = "/run/netns";
/// What the guest's link is called in its VM's namespace.
pub const TAP: &str = "tap0";
/// What leads towards the world is called in every namespace.
pub const UP: &str = "up";
/// The guest's MAC.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x6f, 0x63, 0, 0, 2];
/// The gateway's, in the VM's namespace.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x6f, 0x63, 0, 0, 1];
/// The guest, in a /30.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// Its gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The guest, in a /64.
pub const GUEST6: Ipv6Addr = ula(0, 2);
/// Its gateway.
pub const GATEWAY6: Ipv6Addr = ula(0, 1);
/// Where guests ask for names: an address of the agent's own namespace.
pub const DNS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 53);
/// VMs with a network that one agent may have.
pub const MAX_VMS: u32 = 16_384;
/// Agents that one machine may have.
pub const MAX_AGENTS: u32 = 8_192;

/// An address of our prefix, fdb7:1e5c:c00::/48.
const fn ula(net: u16, host: u32) -> Ipv6Addr {
    Ipv6Addr::new(0xfdb7, 0x1e5c, 0x0c00, net, 0, 0, (host >> 16) as u16, (host & 0xffff) as u16)
}

/// Two ends of a link: /31 and /127, of which the lower is the one nearer to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// IPv4 of the end nearer to the world.
    pub near: Ipv4Addr,
    /// IPv4 of the other one.
    pub far: Ipv4Addr,
    /// IPv6 likewise.
    pub near6: Ipv6Addr,
    /// IPv6 likewise.
    pub far6: Ipv6Addr,
}

impl Pair {
    /// The link between an agent's namespace and that of its VM of that number.
    pub fn of_vm(number: u32) -> Self {
        Self::new(Ipv4Addr::new(198, 19, 0, 0), 1, number)
    }

    /// The link between the host and the namespace of the agent that has taken that number.
    pub fn of_agent(number: u32) -> Self {
        Self::new(Ipv4Addr::new(198, 18, 128, 0), 2, number)
    }

    /// The link of an agent whose nearer end has that IPv4 address.
    pub fn of_agent_at(near: IpAddr) -> Option<Self> {
        let IpAddr::V4(near) = near else { return None };
        let number = near.to_bits().checked_sub(Self::of_agent(0).near.to_bits())? / 2;
        let pair = (number < MAX_AGENTS).then(|| Self::of_agent(number));
        pair.filter(|pair| pair.near == near)
    }

    fn new(base: Ipv4Addr, net: u16, number: u32) -> Self {
        let (near, far) = (2 * number, 2 * number + 1);
        let v4 = |offset| Ipv4Addr::from_bits(base.to_bits() + offset);
        Self { near: v4(near), far: v4(far), near6: ula(net, near), far6: ula(net, far) }
    }
}

/// What the links and namespaces of one agent are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    tag: String,
}

impl Names {
    /// Of the agent that is told from others on this machine by `tag`: eight letters or digits.
    pub fn new(tag: &str) -> Self {
        Self { tag: tag.to_owned() }
    }

    /// The link on the host that leads to the agent's namespace. 15 bytes at most (IFNAMSIZ, netdevice(7)).
    pub fn link(&self) -> String {
        format!("oc{}", self.tag)
    }

    /// The table of the host's packet filter that is this agent's.
    pub fn table(&self) -> String {
        format!("oc-{}", self.tag)
    }

    /// The agent's own namespace.
    pub fn hub(&self) -> String {
        format!("oc-{}", self.tag)
    }

    /// The namespace of a VM.
    pub fn vm(&self, number: u32) -> String {
        format!("oc-{}-{number}", self.tag)
    }

    /// The number of the VM whose namespace is called `name`, if it is one of this agent's.
    pub fn number(&self, name: &str) -> Option<u32> {
        name.strip_prefix(&self.hub())?.strip_prefix('-')?.parse().ok()
    }

    /// The file of the namespace called `name`.
    pub fn file(name: &str) -> PathBuf {
        Path::new(NAMESPACES).join(name)
    }

    /// What leads to a VM is called in the agent's namespace.
    pub fn leg(number: u32) -> String {
        format!("v{number}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_links_share_an_address() {
        let pair = Pair::of_vm(300);
        assert_eq!((pair.near, pair.far), (Ipv4Addr::new(198, 19, 2, 88), Ipv4Addr::new(198, 19, 2, 89)));
        assert_eq!(Pair::of_vm(MAX_VMS - 1).far, Ipv4Addr::new(198, 19, 127, 255));
        assert_eq!(Pair::of_agent(MAX_AGENTS - 1).far, Ipv4Addr::new(198, 18, 191, 255));
        assert!(Pair::of_agent(0).near > DNS);
        for number in [0, 7, MAX_AGENTS - 1] {
            let pair = Pair::of_agent(number);
            assert_eq!(Pair::of_agent_at(pair.near.into()), Some(pair));
            assert_eq!(Pair::of_agent_at(pair.far.into()), None);
        }
        assert_eq!(Pair::of_agent_at(DNS.into()), None);
        assert_eq!(Pair::of_agent_at(Pair::of_vm(0).near.into()), None);
        assert_ne!(Pair::of_vm(7).near6, Pair::of_agent(7).near6);
        assert_eq!(Pair::of_vm(70_000).far6.segments()[6..], [2, 0x22e1]);
    }

    #[test]
    fn names_are_short_and_found_again() {
        let names = Names::new("0a1b2c3d");
        assert!(names.link().len() < 16 && Names::leg(MAX_VMS).len() < 16);
        assert_eq!(names.number(&names.vm(12)), Some(12));
        assert_eq!(names.number(&names.hub()), None);
        assert_eq!(names.number("oc-0a1b2c3e-12"), None);
    }
}
