//! The processor: what it can, and what its faults let one tenant learn of another.

use std::collections::BTreeSet;

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, FIRECRACKER, Finding, check},
    host::Host,
};
use crate::driver::accelerator::extension;

const VULNERABILITIES: &str = "sys/devices/system/cpu/vulnerabilities";
/// The one of them that is about the microcode's age (Linux 6.16).
const OLD_MICROCODE: &str = "old_microcode";

/// All of them.
pub fn all(host: &Host) -> Vec<HostCheck> {
    vec![virtualisation(host), nested(host), smt(host), vulnerabilities(host), microcode(host)]
}

/// Whether it can run guests by itself.
pub fn virtualisation(host: &Host) -> HostCheck {
    let finding = host.read("proc/cpuinfo").map(|cpuinfo| {
        match extension(&cpuinfo) {
            Some(flag) => Finding::ok(format!("the processor has {flag}")),
            None => Finding::problem(
                "the processor shows neither vmx nor svm",
                "switch VT-x or AMD-V on in the firmware; on a virtual machine take one with nested virtualisation, or a \
                 machine of metal",
            ),
        }
    });
    check("cpu-virtualisation", "Virtualisation by the processor", FIRECRACKER, finding)
}

/// Whether the machine is a guest itself.
pub fn nested(host: &Host) -> HostCheck {
    let finding = host.read("proc/cpuinfo").map(|cpuinfo| {
        if flags(&cpuinfo).contains("hypervisor") {
            Finding::warning(
                "this machine is a virtual machine itself",
                "use a machine of metal in production: guests of a guest are slower, and as far apart as its hypervisor keeps them",
            )
        } else {
            Finding::ok("this machine is no guest")
        }
    });
    check("cpu-nested", "Machine of metal", BOTH, finding)
}

/// Whether two sandboxes may share a core.
pub fn smt(host: &Host) -> HostCheck {
    let finding = host.number("sys/devices/system/cpu/smt/active").map(|active| match active {
        0 => Finding::ok("off"),
        _ => Finding::warning(
            "on: a core's threads share caches, by which one tenant may learn of another",
            "boot with `nosmt`, or `echo off > /sys/devices/system/cpu/smt/control`, unless all sandboxes are of one tenant",
        ),
    });
    check("cpu-smt", "Simultaneous multithreading", BOTH, finding)
}

/// Which known faults of the processor are open.
pub fn vulnerabilities(host: &Host) -> HostCheck {
    let finding = read_vulnerabilities(host).map(|all| {
        let is_open = |(name, state): &(String, String)| {
            (name != OLD_MICROCODE && state.to_lowercase().contains("vulnerable"))
                .then(|| format!("{name} ({state})"))
        };
        let open: Vec<String> = all.iter().filter_map(is_open).collect();
        if open.is_empty() {
            return Finding::ok(format!("{} known faults, none of them open", all.len()));
        }
        Finding::warning(
            format!("open: {}", open.join("; ")),
            "update kernel and microcode, and boot with `mitigations=auto,nosmt` and none of them switched off; see the kernel's \
             admin-guide/hw-vuln",
        )
    });
    check("cpu-vulnerabilities", "Faults of the processor", BOTH, finding)
}

/// Which microcode it runs.
pub fn microcode(host: &Host) -> HostCheck {
    let finding = host.read("proc/cpuinfo").and_then(|cpuinfo| {
        let model = field(&cpuinfo, "model name").unwrap_or("a processor without a name");
        let revision = field(&cpuinfo, "microcode")
            .ok_or_else(|| Finding::unknown(format!("{model} does not show its microcode")))?;
        let found = format!("{model}, microcode {revision}");
        let age = host.try_read(&format!("{VULNERABILITIES}/{OLD_MICROCODE}")).unwrap_or_default();
        Ok(if age.starts_with("Vulnerable") {
            Finding::warning(
                format!("{found}, which the kernel knows to be old"),
                "install the vendor's microcode (amd64-microcode or intel-microcode) and boot anew",
            )
        } else {
            Finding::ok(found)
        })
    });
    check("cpu-microcode", "Microcode", BOTH, finding)
}

/// Names and states, in the order of the names.
fn read_vulnerabilities(host: &Host) -> Result<Vec<(String, String)>, Finding> {
    let failed = |error: std::io::Error| Finding::unknown(format!("cannot read /{VULNERABILITIES}: {error}"));
    let mut all = Vec::new();
    for entry in std::fs::read_dir(host.path(VULNERABILITIES)).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let state = host.read(&format!("{VULNERABILITIES}/{name}"))?;
        all.push((name, state));
    }
    all.sort_unstable();
    Ok(all)
}

/// What the first processor can.
fn flags(cpuinfo: &str) -> BTreeSet<&str> {
    field(cpuinfo, "flags").unwrap_or_default().split_whitespace().collect()
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    const METAL: &str = "processor\t: 0\nmodel name\t: Xeon\nmicrocode\t: 0x2b\nflags\t\t: fpu vmx sse\n";
    const GUEST: &str = "processor : 0\nmodel name : EPYC\nflags : fpu hypervisor\n";

    #[test]
    fn a_machine_of_metal_is_told_from_a_guest() {
        let [metal, guest] = [METAL, GUEST].map(|cpuinfo| Machine::with([("proc/cpuinfo", cpuinfo)]));
        assert_eq!(virtualisation(&metal.host()).status(), Fine);
        assert_eq!(nested(&metal.host()).status(), Fine);
        assert_eq!(virtualisation(&guest.host()).status(), Problem);
        assert_eq!(nested(&guest.host()).status(), Warning);
        assert_eq!(virtualisation(&Machine::with([]).host()).status(), Unknown);
    }

    #[test]
    fn threads_of_a_core_are_warned_of() {
        for (active, status) in [("0", Fine), ("1\n", Warning), ("", Unknown)] {
            let machine = Machine::with([("sys/devices/system/cpu/smt/active", active)]);
            assert_eq!(smt(&machine.host()).status(), status);
        }
    }

    #[test]
    fn open_faults_are_named() {
        let file = |name: &str| format!("{VULNERABILITIES}/{name}");
        let machine = Machine::with([]);
        machine.write(&file("meltdown"), "Not affected\n");
        machine.write(&file("spectre_v1"), "Mitigation: barriers\n");
        assert_eq!(vulnerabilities(&machine.host()).status(), Fine);
        machine.write(&file("mds"), "Mitigation: Clear CPU buffers; SMT vulnerable\n");
        machine.write(&file("old_microcode"), "Vulnerable\n");
        let told = vulnerabilities(&machine.host());
        assert_eq!(told.status(), Warning);
        assert!(told.found.contains("mds (") && !told.found.contains("spectre"), "{}", told.found);
        assert!(!told.found.contains("old_microcode"), "it has a check of its own");
        assert_eq!(vulnerabilities(&Machine::with([]).host()).status(), Unknown);
    }

    #[test]
    fn microcode_is_shown_and_old_one_is_warned_of() {
        let machine = Machine::with([("proc/cpuinfo", METAL)]);
        let told = microcode(&machine.host());
        assert_eq!((told.status(), told.found.as_str()), (Fine, "Xeon, microcode 0x2b"));
        machine.write(&format!("{VULNERABILITIES}/{OLD_MICROCODE}"), "Vulnerable\n");
        assert_eq!(microcode(&machine.host()).status(), Warning);
        machine.write("proc/cpuinfo", GUEST);
        assert_eq!(microcode(&machine.host()).status(), Unknown);
    }
}
