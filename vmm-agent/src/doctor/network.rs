//! What the VMs' network takes of the host.

use std::{io, path::Path};

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, Finding, check},
    host::Host,
};

/// Without this the agent has to be told.
const WITHOUT: &str = "or run the agent with --network off";
/// Connections that a sandbox has at once, on average of all: their bound for each is higher.
const CONNECTIONS_EACH: u64 = 512;

/// All of them.
pub async fn all(host: &Host) -> Vec<HostCheck> {
    vec![tun(host), nftables(host).await, forwarding(host), connections(host)]
}

/// Whether TAPs can be made.
pub fn tun(host: &Host) -> HostCheck {
    let path = host.path("dev/net/tun");
    let finding = match std::fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::ok("/dev/net/tun can be used"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Finding::problem("there is no /dev/net/tun", format!("modprobe tun, {WITHOUT}"))
        }
        Err(error) => Finding::problem(
            format!("/dev/net/tun cannot be opened: {error}"),
            format!("run the agent as root, {WITHOUT}"),
        ),
    };
    check("network-tun", "TAP devices", BOTH, Ok(finding))
}

/// Whether there are nftables: the program, and what it talks to in the kernel.
pub async fn nftables(host: &Host) -> HostCheck {
    let finding = match host.program(Path::new("nft")) {
        None => Finding::problem("there is no program nft", format!("install nftables, {WITHOUT}")),
        Some(nft) => {
            let version = host.run(&nft, &["--version"]).await;
            match (version, host.run(&nft, &["list", "tables"]).await) {
                (Ok(version), Ok(_)) => Finding::ok(version.trim()),
                (Err(reason), _) | (_, Err(reason)) => {
                    Finding::problem(reason, format!("modprobe nf_tables, and run this as root, {WITHOUT}"))
                }
            }
        }
    };
    check("network-nftables", "nftables", BOTH, Ok(finding))
}

/// Whether packets are passed on: a fact, the agent sees to it.
pub fn forwarding(host: &Host) -> HostCheck {
    let finding = host.number("proc/sys/net/ipv4/ip_forward").map(|forward| match forward {
        0 => Finding::ok("off: the agent switches it on when it starts"),
        _ => Finding::ok("on"),
    });
    check("network-forwarding", "Forwarding of packets", BOTH, finding)
}

/// How many connections the kernel follows: those of all sandboxes are in one namespace's table.
pub fn connections(host: &Host) -> HostCheck {
    let most = match host.try_read("proc/sys/net/netfilter/nf_conntrack_max") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Finding::unknown(
            "the kernel follows none yet: nf_conntrack is loaded with the agent's rules",
        )),
        _ => host.number("proc/sys/net/netfilter/nf_conntrack_max"),
    };
    let finding = most.and_then(|most| {
        let sandboxes = host.sandboxes()?;
        let wanted = sandboxes.saturating_mul(CONNECTIONS_EACH);
        let found = format!("{most} connections; {sandboxes} sandboxes want {wanted}");
        Ok(if most < wanted {
            let wanted = wanted.next_power_of_two();
            Finding::warning(found, format!("sysctl -w net.netfilter.nf_conntrack_max={wanted}"))
        } else {
            Finding::ok(found)
        })
    });
    check("network-connections", "Followed connections", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    #[tokio::test]
    async fn what_is_missing_is_a_problem_unless_there_is_no_network() {
        let machine = Machine::with([]);
        for told in [tun(&machine.host()), nftables(&machine.host()).await] {
            assert_eq!(told.status(), Problem);
            assert!(told.remedy.ends_with("--network off"), "{}", told.remedy);
        }
        machine.write("dev/net/tun", "");
        assert_eq!(tun(&machine.host()).status(), Fine);
        machine.program("nft", "[ $1 = --version ] && echo 'nftables v1.0.6 (Lester Gooch #5)'");
        let told = nftables(&machine.host()).await;
        assert!(told.status() == Problem && told.found.contains("nft fails"), "{told:?}");
        machine.program("nft", "[ $1 = --version ] && echo 'nftables v1.0.6 (Lester Gooch #5)'; true");
        let told = nftables(&machine.host()).await;
        assert_eq!((told.status(), told.found.as_str()), (Fine, "nftables v1.0.6 (Lester Gooch #5)"));
    }

    #[test]
    fn tables_are_to_hold_the_connections_of_all() {
        let machine = Machine::with([("proc/meminfo", "MemTotal: 16777216 kB\n")]);
        assert_eq!(connections(&machine.host()).status(), Unknown);
        for (most, status) in [("65536", Fine), ("65535", Warning)] {
            machine.write("proc/sys/net/netfilter/nf_conntrack_max", most);
            assert_eq!(connections(&machine.host()).status(), status);
        }
        machine.write("proc/sys/net/ipv4/ip_forward", "0");
        assert_eq!(forwarding(&machine.host()).status(), Fine);
    }
}
