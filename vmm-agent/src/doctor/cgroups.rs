//! Control groups: which version, and whether the controllers that bound a VM are there.

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, Finding, check},
    host::Host,
};
use crate::driver::cgroup::CONTROLLERS;

const ROOT: &str = "sys/fs/cgroup";

/// All of them.
pub fn all(host: &Host) -> Vec<HostCheck> {
    vec![version(host), controllers(host)]
}

fn is_unified(host: &Host) -> bool {
    host.has("sys/fs/cgroup/cgroup.controllers")
}

/// Which version is mounted where the agent looks.
pub fn version(host: &Host) -> HostCheck {
    let finding = if is_unified(host) {
        Finding::ok("version 2")
    } else {
        Finding::warning(
            "version 1: VMs start and are restored more slowly",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup in place of version 1",
        )
    };
    check("cgroup-version", "Control groups", BOTH, Ok(finding))
}

/// Whether memory, CPU and processes can be bounded.
pub fn controllers(host: &Host) -> HostCheck {
    let missing = if is_unified(host) {
        host.read("sys/fs/cgroup/cgroup.controllers").map(|names| {
            let has = |wanted: &&str| names.split_whitespace().any(|name| name == *wanted);
            CONTROLLERS.into_iter().filter(|wanted| !has(wanted)).collect::<Vec<_>>()
        })
    } else {
        let has = |wanted: &&str| host.has(&format!("{ROOT}/{wanted}/cgroup.procs"));
        Ok(CONTROLLERS.into_iter().filter(|wanted| !has(wanted)).collect())
    };
    let finding = missing.map(|missing| {
        if missing.is_empty() {
            return Finding::ok(CONTROLLERS.join(", "));
        }
        Finding::problem(
            format!("{} missing in /{ROOT}", missing.join(", ")),
            "mount these controllers there; boot with cgroup_enable=memory where that one is off",
        )
    });
    check("cgroup-controllers", "Controllers of control groups", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Warning};

    use super::{super::host::made_up::Machine, *};

    #[test]
    fn version_two_is_preferred() {
        let two = Machine::with([("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")]);
        assert_eq!(version(&two.host()).status(), Fine);
        assert_eq!(controllers(&two.host()).status(), Fine);
        two.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io\n");
        let told = controllers(&two.host());
        assert_eq!(told.status(), Problem);
        assert!(told.found.starts_with("memory, pids missing"), "{}", told.found);
    }

    #[test]
    fn version_one_will_do() {
        let one = Machine::with(["memory", "cpu", "pids"].map(|tree| match tree {
            "memory" => ("sys/fs/cgroup/memory/cgroup.procs", ""),
            "cpu" => ("sys/fs/cgroup/cpu/cgroup.procs", ""),
            _ => ("sys/fs/cgroup/pids/cgroup.procs", ""),
        }));
        assert_eq!(version(&one.host()).status(), Warning);
        assert_eq!(controllers(&one.host()).status(), Fine);
        assert_eq!(controllers(&Machine::with([]).host()).status(), Problem);
    }
}
