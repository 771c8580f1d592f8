//! What may pass: the packet filter of a VM's namespace, of the agent's and of the host, in nft's own language (nft(8)).
//!
//! Nothing of it changes while a VM runs but the sets of what it may reach, and those by netlink ([`sets`]). It is loaded when a
//! namespace is made, ahead of its use.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::{Command, Stdio},
};

use ipnet::IpNet;

use super::{
    Egress, Settings,
    plan::{DNS, GATEWAY, GATEWAY6, GUEST, GUEST_MAC, GUEST6, Names, Pair, TAP, UP},
    sets,
};

/// What is not the internet: the registries of special addresses (RFC 6890), and what is multicast or reserved.
const NOT_THE_INTERNET: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, \
     192.0.0.0/24, 192.0.2.0/24, 192.88.99.0/24, 192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, \
     224.0.0.0/3";
/// Of IPv6 all that is not global unicast, and in that what leads to IPv4 addresses by another name (Teredo, 6to4), ORCHIDs
/// and addresses for documentation.
const NOT_THE_INTERNET6: &str = "::/3, 2001::/23, 2001:db8::/32, 2002::/16, 3fff::/20, 4000::/2, 8000::/1";
/// New connections of a VM each second.
const NEW_PER_SECOND: u32 = 500;
/// Questions for names of a VM each second, by UDP.
const NAMES_PER_SECOND: u32 = 200;

/// The filter of a VM's namespace.
pub fn of_vm(settings: &Settings) -> String {
    let [a, b, c, d, e, f] = GUEST_MAC;
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let bytes = u64::from(settings.mbit) * 1_000_000 / 8;
    let rate = format!("limit rate over {bytes} bytes/second burst {} bytes counter drop", bytes / 4);
    let connections = settings.connections;
    let (allowed4, allowed6) = allowed(&settings.allow);
    format!(
        r#"
table netdev oc {{
    # Who a guest says that it is. Its neighbours are pinned, so that nobody needs to ask for them.
    chain guest {{
        type filter hook ingress device "{TAP}" priority 0; policy drop;
        ether saddr != {mac} counter drop
        ether type ip ip saddr {GUEST} accept
        ether type ip6 ip6 saddr {GUEST6} accept
        ether type arp arp htype 1 arp ptype ip arp saddr ether {mac} arp saddr ip {GUEST} arp daddr ip {GATEWAY} accept
        counter
    }}
}}
table inet oc {{
    # Where the guest may go: the policy is these three. What the operator has excepted, and what is not the internet.
    set egress4 {{ type ipv4_addr; flags interval; elements = {{ 0.0.0.0/0 }} }}
    set egress6 {{ type ipv6_addr; flags interval; elements = {{ ::/0 }} }}
    set resolvers {{ type ipv4_addr; elements = {{ {DNS} }} }}
    set allowed4 {{ type ipv4_addr; flags interval; auto-merge; {allowed4} }}
    set allowed6 {{ type ipv6_addr; flags interval; auto-merge; {allowed6} }}
    set denied4 {{ type ipv4_addr; flags interval; elements = {{ {NOT_THE_INTERNET} }} }}
    set denied6 {{ type ipv6_addr; flags interval; elements = {{ {NOT_THE_INTERNET6} }} }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{TAP}" {rate}
        oifname "{TAP}" {rate}
        # Before what is known already: who has had one answer asks by the same conversation.
        iifname "{TAP}" ip daddr @resolvers udp dport 53 limit rate over {NAMES_PER_SECOND}/second burst {NAMES_PER_SECOND} packets counter drop
        ct state invalid drop
        ct state established,related accept
        iifname != "{TAP}" drop
        limit rate over {NEW_PER_SECOND}/second burst {NEW_PER_SECOND} packets counter drop
        ct count over {connections} counter drop
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr != @egress4 counter reject with icmpx admin-prohibited
        ip6 daddr != @egress6 counter reject with icmpx admin-prohibited
        ip daddr @allowed4 accept
        ip6 daddr @allowed6 accept
        ip daddr @denied4 counter reject with icmpx admin-prohibited
        ip6 daddr @denied6 counter reject with icmpx admin-prohibited
        accept
    }}
    # Nobody answers here but to a ping of the gateway, and to what a guest remembers of connections of another life: with their end.
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "{UP}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "{TAP}" ip daddr {GATEWAY} icmp type echo-request limit rate 50/second accept
        iifname "{TAP}" ip6 daddr {GATEWAY6} icmpv6 type echo-request limit rate 50/second accept
        iifname "{TAP}" ip daddr {GATEWAY} meta l4proto tcp limit rate 500/second reject with tcp reset
    }}
    # Whoever runs here, such as a VMM that its guest has taken over, reaches that guest and nobody else.
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "{TAP}" accept
        oifname "{UP}" ct state established,related accept
        oifname "{UP}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    }}
    chain source {{
        type nat hook postrouting priority srcnat;
        oifname "{UP}" masquerade
    }}
}}
"#
    )
}

fn allowed(nets: &[IpNet]) -> (String, String) {
    let elements = |is_wanted: fn(&IpNet) -> bool| {
        let mut list = String::new();
        for net in nets.iter().filter(|net| is_wanted(net)) {
            let separator = if list.is_empty() { "elements = { " } else { ", " };
            let _ = write!(list, "{separator}{}", net.trunc());
        }
        if list.is_empty() { list } else { list + " }" }
    };
    (elements(|net| net.addr().is_ipv4()), elements(|net| net.addr().is_ipv6()))
}

/// Sets what the VM may reach that has this thread's namespace: all that is not denied, or nothing.
///
/// # Errors
///
/// If its filter is not loaded, or does not take it: then it is as it was.
pub fn restrict(egress: Egress) -> io::Result<()> {
    let all: [(&str, &[u8]); 3] = [("egress4", &[0; 4]), ("egress6", &[0; 16]), ("resolvers", &DNS.octets())];
    let sets = all.map(|(set, key)| (set, (egress == Egress::Open).then_some(key)));
    sets::fill("oc", &sets)
}

/// The filter of an agent's own namespace: each VM may go to the world, and none to another.
pub fn of_hub() -> String {
    format!(
        r#"
table inet oc {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "v*" oifname "{UP}" accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "v*" ip daddr {DNS} meta l4proto {{ tcp, udp }} th dport 53 accept
    }}
    chain source {{
        type nat hook postrouting priority srcnat;
        oifname "{UP}" masquerade
    }}
}}
"#
    )
}

/// What the host adds to its own filter for the agent whose namespace it is linked to by `pair`: no way to itself, no way in.
/// Replaces what was there of it.
pub fn of_host(names: &Names, pair: &Pair) -> String {
    let (table, link) = (names.table(), names.link());
    let (far, far6) = (pair.far, pair.far6);
    format!(
        r#"
table inet {table} {{ }}
delete table inet {table}
table inet {table} {{
    chain input {{
        type filter hook input priority filter - 5; policy accept;
        iifname "{link}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "{link}" counter drop
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        # What the host leads on to somewhere else, as a port of a container, is a service of the host, too.
        iifname "{link}" ct status dnat counter drop
        iifname "{link}" tcp flags syn tcp option maxseg size set rt mtu
        oifname "{link}" tcp flags syn tcp option maxseg size set rt mtu
        oifname "{link}" ct state established,related accept
        oifname "{link}" drop
    }}
    chain source {{
        type nat hook postrouting priority srcnat;
        ip saddr {far} oifname != "{link}" masquerade
        ip6 saddr {far6} oifname != "{link}" masquerade
    }}
}}
"#
    )
}

/// Removes the host's part.
pub fn without_host(names: &Names) -> String {
    let table = names.table();
    format!("table inet {table} {{ }}\ndelete table inet {table}\n")
}

/// Loads `rules` in the namespace of this thread, all or nothing.
///
/// # Errors
///
/// What nft says.
pub fn load(rules: &str) -> io::Result<()> {
    let nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut nft = nft.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot run nft: {error}; install nftables"))
    })?;
    let written = nft.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(rules.as_bytes()));
    let output = nft.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("nft: {}", said.trim())));
    }
    written
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::{super::tap, *};

    /// A set of a VM's filter, as nft writes it.
    fn listed(set: &str) -> String {
        let listed = Command::new("nft").args(["list", "set", "inet", "oc", set]).output().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        String::from_utf8(listed.stdout).unwrap()
    }

    #[test]
    fn what_a_vm_may_reach_is_changed_in_the_filter_that_is_loaded() {
        let settings = Settings {
            allow: vec!["10.1.2.0/24".parse().unwrap()],
            resolv_conf: "/etc/resolv.conf".into(),
            // As many and as much as may be (config.rs).
            connections: 262_144,
            mbit: 100_000,
        };
        let in_its_namespace = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let unloaded = restrict(Egress::Nothing).unwrap_err();
            assert_eq!(unloaded.kind(), io::ErrorKind::NotFound);
            let _tap = tap::open(TAP).unwrap();
            load(&of_vm(&settings)).unwrap();
            let sets = ["egress4", "egress6", "resolvers"];
            let all = sets.map(listed);
            for (listed, element) in all.iter().zip(["0.0.0.0/0", "::/0", "198.18.0.53"]) {
                assert!(listed.contains(&format!("elements = {{ {element} }}")), "{listed}");
            }
            // Whatever it was before.
            for _ in 0..2 {
                restrict(Egress::Nothing).unwrap();
                for listed in sets.map(listed) {
                    assert!(!listed.contains("elements"), "{listed}");
                }
            }
            for _ in 0..2 {
                restrict(Egress::Open).unwrap();
                assert_eq!(sets.map(listed), all);
            }
            assert!(listed("allowed4").contains("10.1.2.0/24"), "the rest is as it was");
        };
        thread::spawn(in_its_namespace).join().unwrap();
    }

    #[test]
    fn what_is_not_the_internet_is_denied() {
        let denied: Vec<IpNet> = format!("{NOT_THE_INTERNET}, {NOT_THE_INTERNET6}")
            .split(", ")
            .map(|net| net.parse().unwrap())
            .collect();
        let is_denied = |address: &str| {
            let address: std::net::IpAddr = address.parse().unwrap();
            denied.iter().any(|net| net.contains(&address))
        };
        for address in [
            "0.0.0.0",
            "10.255.0.1",
            "100.64.0.1",
            "127.0.0.1",
            // Where clouds tell a machine its secrets.
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "198.18.0.53",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2001::1",
            "2001:db8::1",
            "2002:a9fe:a9fe::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(is_denied(address), "{address}");
        }
        for address in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1", "2001:4860::1"]
        {
            assert!(!is_denied(address), "{address}");
        }
    }

    #[test]
    fn exceptions_are_sorted_into_their_sets() {
        let nets = ["192.168.7.9/24", "fd00::/8", "10.0.0.1/32"].map(|net| net.parse().unwrap());
        let (four, six) = allowed(&nets);
        assert_eq!(four, "elements = { 192.168.7.0/24, 10.0.0.1/32 }");
        assert_eq!(six, "elements = { fd00::/8 }");
        assert_eq!(allowed(&[]), (String::new(), String::new()));
    }
}
