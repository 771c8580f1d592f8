//! What may pass: the packet filter of a VM's namespace, of the agent's and of the host, in nft's own language (nft(8)).
//!
//! Nothing of it changes while a VM runs but the sets of what it may reach, and those by netlink ([`sets`]). It is loaded when a
//! namespace is made, ahead of its use.

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    net::SocketAddr,
    process::{Command, Stdio},
};

use ipnet::IpNet;

use super::{
    Egress, Settings,
    plan::{DNS, GATEWAY, GATEWAY6, GUEST, GUEST_MAC, GUEST6, MAX_VMS, Names, Pair, TAP, UP},
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
/// What is followed: by these a translator tells conversations apart, and knows when they end.
const PROTOCOLS: &str = "tcp, udp, icmp, icmpv6";
/// Least hop count of TCP: what a guest sends passes its own namespace, the agent's and the host, and all see it or none. Else it
/// could end a connection where its own are counted, and nowhere else.
const LEAST_HOPS: u32 = 4;
/// How long a connection may be silent, seconds: as a translator must wait at least (RFC 5382, REQ-5).
pub const SILENT_FOR: u32 = 7440;
/// How long a connection is remembered that has ended, seconds: it does not count as one that a VM has, but takes room as one. No shorter
/// than a last acknowledgement may need to be sent once more.
pub const ENDED_FOR: u32 = 10;
/// How many times a VM's own limit is followed for it in the agent's namespace, which may hear of an end later than the VM's.
const SLACK: u32 = 2;

/// The filter of a VM's namespace.
pub fn of_vm(settings: &Settings) -> String {
    let [a, b, c, d, e, f] = GUEST_MAC;
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    let bytes = u64::from(settings.limits.mbit) * 1_000_000 / 8;
    let rate = format!("limit rate over {bytes} bytes/second burst {} bytes counter drop", bytes / 4);
    let connections = settings.limits.connections;
    let (allowed4, allowed6) = allowed(&settings.allow);
    format!(
        r#"
table netdev oc {{
    # Who a guest says that it is. Its neighbours are pinned, so that nobody needs to ask for them.
    chain guest {{
        type filter hook ingress device "{TAP}" priority 0; policy drop;
        ether saddr != {mac} counter drop
        # Whatever drops, drops before it is followed: what was followed in this namespace is in those behind, too. Options of IPv4 and
        # extension headers can have a packet dropped there.
        ip hdrlength > 5 counter drop
        ip6 nexthdr != {{ {PROTOCOLS}, ipv6-frag }} counter drop
        ip protocol tcp ip ttl < {LEAST_HOPS} counter drop
        ip6 nexthdr {{ tcp, ipv6-frag }} ip6 hoplimit < {LEAST_HOPS} counter drop
        # The host's own conversations with a port are nobody's traffic but its own.
        ether type ip ip saddr {GUEST} ip daddr {GATEWAY} accept
        ether type ip6 ip6 saddr {GUEST6} ip6 daddr {GATEWAY6} accept
        {rate}
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
    # What was in fragments: these are put together by now, and not followed yet.
    chain whole {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{TAP}" meta nfproto ipv6 ip6 nexthdr != {{ {PROTOCOLS} }} counter drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        oifname "{TAP}" {rate}
        meta l4proto != {{ {PROTOCOLS} }} counter drop
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
    let (four, six): (Vec<_>, Vec<_>) = nets.iter().map(IpNet::trunc).partition(|net| net.addr().is_ipv4());
    (elements(&four), elements(&six))
}

/// What a set has from the start.
fn elements(all: &[impl ToString]) -> String {
    if all.is_empty() { String::new() } else { format!("elements = {{ {} }}", list(all)) }
}

fn list(all: &[impl ToString]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
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

/// The filter of an agent's own namespace: each VM may go to the world, and none to another. Replaces what was there, all at once: chains
/// stay where they are hooked in, as between one that is removed and its successor packets would go on untranslated.
pub fn of_hub(settings: &Settings) -> String {
    let connections = settings.limits.connections.saturating_mul(SLACK);
    format!(
        r#"
table inet oc {{
    # The connections of each link. The VM's namespace counts its own; this is for what only it took for ended.
    set legs {{ type ifname; size {MAX_VMS}; flags dynamic; }}
}}
flush table inet oc
flush set inet oc legs
table inet oc {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state invalid drop
        meta l4proto != {{ {PROTOCOLS} }} counter drop
        ct state established,related accept
        iifname "v*" add @legs {{ iifname ct count over {connections} }} counter drop
        iifname "v*" oifname "{UP}" accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "v*" add @legs {{ iifname ct count over {connections} }} counter drop
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

/// What the host adds to its own filter for the agent whose namespace it is linked to by `pair`: no way to itself, no way in, and
/// none to the [`parts`] of the mesh. Replaces what was there of it, but for which those are: VMs of an earlier agent run on.
pub fn of_host(names: &Names, pair: &Pair) -> String {
    let (table, link) = (names.table(), names.link());
    let (far, far6) = (pair.far, pair.far6);
    // What is there of that name is not changed: others have another.
    let silent = format!("silent-{SILENT_FOR}-{ENDED_FOR}");
    let policy = format!("protocol tcp; policy = {{ established: {SILENT_FOR}, time_wait: {ENDED_FOR} }}");
    format!(
        r#"
table inet {table} {{ }}
flush table inet {table}
table inet {table} {{
    # Where parts of the mesh listen, which ask nobody who calls.
    set parts4 {{ type ipv4_addr . inet_service; }}
    set parts6 {{ type ipv6_addr . inet_service; }}
    ct timeout {silent}-ip {{ l3proto ip; {policy}; }}
    ct timeout {silent}-ip6 {{ l3proto ip6; {policy}; }}
    chain input {{
        type filter hook input priority filter - 5; policy accept;
        iifname "{link}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "{link}" counter drop
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        # What is not translated must not go on.
        iifname "{link}" ct state invalid counter drop
        iifname "{link}" ip saddr != {far} counter drop
        iifname "{link}" ip6 saddr != {far6} counter drop
        # What the host leads on to somewhere else, as a port of a container, is a service of the host, too.
        iifname "{link}" ct status dnat counter drop
        iifname "{link}" ip daddr . tcp dport @parts4 counter reject with icmpx admin-prohibited
        iifname "{link}" ip6 daddr . tcp dport @parts6 counter reject with icmpx admin-prohibited
        iifname "{link}" ct state new meta nfproto ipv4 meta l4proto tcp ct timeout set "{silent}-ip"
        iifname "{link}" ct state new meta nfproto ipv6 meta l4proto tcp ct timeout set "{silent}-ip6"
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

/// Adds to where the parts of the mesh listen, in what [`of_host`] has made. None is taken out: who is no member at the moment, or is not
/// found, may listen all the same.
pub fn parts(names: &Names, parts: &BTreeSet<SocketAddr>) -> String {
    let table = names.table();
    let set = |name: &str, is_its: fn(&&SocketAddr) -> bool| {
        let own: Vec<_> =
            parts.iter().filter(is_its).map(|part| format!("{} . {}", part.ip(), part.port())).collect();
        if own.is_empty() {
            return String::new();
        }
        format!("add element inet {table} {name} {{ {} }}\n", list(&own))
    };
    set("parts4", |part| part.is_ipv4()) + &set("parts6", |part| part.is_ipv6())
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

    use super::{
        super::{Limits, tap},
        *,
    };

    /// A set of a filter, as nft writes it.
    fn listed(table: &str, set: &str) -> String {
        let listed = Command::new("nft").args(["list", "set", "inet", table, set]).output().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        String::from_utf8(listed.stdout).unwrap()
    }

    #[test]
    fn what_a_vm_may_reach_is_changed_in_the_filter_that_is_loaded() {
        let settings = Settings {
            allow: vec!["10.1.2.0/24".parse().unwrap()],
            resolv_conf: "/etc/resolv.conf".into(),
            // As many and as much as may be (config.rs).
            limits: Limits { connections: 262_144, mbit: 100_000 },
        };
        let in_its_namespace = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let unloaded = restrict(Egress::Nothing).unwrap_err();
            assert_eq!(unloaded.kind(), io::ErrorKind::NotFound);
            let _tap = tap::open(TAP).unwrap();
            load(&of_vm(&settings)).unwrap();
            let (sets, of_vm_listed) = (["egress4", "egress6", "resolvers"], |set| listed("oc", set));
            let all = sets.map(of_vm_listed);
            for (listed, element) in all.iter().zip(["0.0.0.0/0", "::/0", "198.18.0.53"]) {
                assert!(listed.contains(&format!("elements = {{ {element} }}")), "{listed}");
            }
            // Whatever it was before.
            for _ in 0..2 {
                restrict(Egress::Nothing).unwrap();
                for listed in sets.map(of_vm_listed) {
                    assert!(!listed.contains("elements"), "{listed}");
                }
            }
            for _ in 0..2 {
                restrict(Egress::Open).unwrap();
                assert_eq!(sets.map(of_vm_listed), all);
            }
            assert!(of_vm_listed("allowed4").contains("10.1.2.0/24"), "the rest is as it was");
        };
        thread::spawn(in_its_namespace).join().unwrap();
    }

    #[test]
    fn what_guests_are_kept_from_stays_whatever_an_agent_knows_of() {
        let in_its_namespace = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let (names, pair) = (Names::new("testtest"), Pair::of_agent(0));
            let told = |all: &[&str]| {
                let all = all.iter().map(|part| part.parse().unwrap()).collect();
                load(&parts(&names, &all)).unwrap();
            };
            for _ in 0..2 {
                load(&of_host(&names, &pair)).unwrap();
                told(&[]);
                told(&["10.1.2.3:7000", "[fd00::1]:7100"]);
                // The next agent finds one of them, and another.
                load(&of_host(&names, &pair)).unwrap();
                told(&["10.1.2.3:7000", "10.1.2.4:7000"]);
                let [four, six] = ["parts4", "parts6"].map(|set| listed(&names.table(), set));
                assert!(four.contains("10.1.2.3 . 7000") && four.contains("10.1.2.4 . 7000"), "{four}");
                assert!(six.contains("fd00::1 . 7100"), "{six}");
            }
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
