//! The kernel: its version, what it remembers of memory, and how much of everything it grants.

use std::io;

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, FIRECRACKER, Finding, QEMU, check},
    host::Host,
};
use crate::driver::userfaultfd;

/// `pidfd_getfd(2)`, by which the agent shares a VMM's descriptor.
const LEAST: (u32, u32) = (5, 6);
/// What the versions of Firecracker that are supported here are tested on (its docs/kernel-policy.md).
const TESTED: [(u32, u32); 2] = [(5, 10), (6, 1)];
/// Likewise, from its version 1.16 on, which is not supported here.
const TESTED_LATER: (u32, u32) = (6, 18);
/// When `/dev/userfaultfd` came.
const USERFAULTFD_SINCE: (u32, u32) = (6, 1);
/// Files that the agent has open for each sandbox: sockets, images, the guest's link, and some for calls.
const FILES_EACH: u64 = 32;
/// Threads and processes of a sandbox: virtual CPUs, the VMM's own, and helpers of the agent.
const TASKS_EACH: u64 = 16;
/// What the agent and the rest of the machine have of either.
const BESIDE: u64 = 4096;
/// Linux's own setting; a VMM that grows many mappings stops at it.
const MEMORY_MAPS: u64 = 65_530;
/// Messages of lesser weight than this number are printed with `quiet` no more (`CONSOLE_LOGLEVEL_QUIET` in Linux).
const QUIET: u64 = 4;

/// All of them.
pub fn all(host: &Host) -> Vec<HostCheck> {
    vec![
        version(host),
        tested(host),
        privileges(host),
        writes(userfaultfd::is_supported()),
        userfaultfd_device(host),
        open_files(host),
        tasks(host),
        memory_maps(host),
        network_namespaces(host),
        users(host),
        console(host),
        randomness(host),
        clock(host),
    ]
}

/// Whether the agent gets on with it.
pub fn version(host: &Host) -> HostCheck {
    let finding = host.kernel().and_then(|version| {
        let release = host.read("proc/sys/kernel/osrelease")?;
        Ok(if version < LEAST {
            let (major, minor) = LEAST;
            Finding::problem(format!("Linux {release}"), format!("use Linux {major}.{minor} or newer"))
        } else {
            Finding::ok(format!("Linux {release}"))
        })
    });
    check("kernel-version", "Kernel", BOTH, finding)
}

/// Whether Firecracker is tested on it.
pub fn tested(host: &Host) -> HostCheck {
    let finding = host.kernel().map(|version| {
        let (major, minor) = version;
        if TESTED.contains(&version) {
            return Finding::ok(format!("Firecracker is tested on Linux {major}.{minor}"));
        }
        let found = if version == TESTED_LATER {
            format!("Firecracker is tested on Linux {major}.{minor} from its version 1.16 on, which is not supported here")
        } else {
            format!("Firecracker is not tested on Linux {major}.{minor}")
        };
        Finding::warning(found, "use Linux 5.10 or 6.1, or try it yourself before it is for production")
    });
    check("kernel-tested", "Kernel that Firecracker is tested on", FIRECRACKER, finding)
}

/// Whether an agent that is started as this process was may do what it must.
pub fn privileges(host: &Host) -> HostCheck {
    let finding = host.read("proc/self/status").and_then(|status| {
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        let effective = uids.and_then(|uids| uids.split_whitespace().nth(1));
        match effective {
            Some("0") => Ok(Finding::ok("root")),
            Some(uid) => Ok(Finding::problem(
                format!("user {uid}: control groups and other users' processes are root's to make"),
                "run the agent, and this, as root",
            )),
            None => Err(Finding::unknown("/proc/self/status does not say who this process is")),
        }
    });
    check("privileges", "User of the agent", BOTH, finding)
}

/// Whether the kernel remembers which pages a VMM writes.
pub fn writes(is_supported: bool) -> HostCheck {
    let finding = if is_supported {
        Finding::ok("the kernel remembers them: a checkpoint costs what changed since the one before")
    } else {
        Finding::warning(
            "the kernel does not remember them: each checkpoint costs all that changed since the sandbox was started",
            "use Linux 6.7 or newer, with userfaultfd",
        )
    };
    check("kernel-writes", "Written pages", QEMU, Ok(finding))
}

/// Whether a jailed Firecracker may have its page faults handled.
pub fn userfaultfd_device(host: &Host) -> HostCheck {
    let finding = host.kernel().map(|version| {
        if host.has("dev/userfaultfd") {
            Finding::ok("/dev/userfaultfd is there, for the jailer to pass on")
        } else if version < USERFAULTFD_SINCE {
            Finding::ok("not a device with this kernel, but a system call")
        } else {
            Finding::warning(
                "there is no /dev/userfaultfd: memory cannot be loaded by a handler of page faults, only from its file",
                "use a kernel with CONFIG_USERFAULTFD",
            )
        }
    });
    check("kernel-userfaultfd", "Page faults in user space", FIRECRACKER, finding)
}

/// How many files the agent may open.
pub fn open_files(host: &Host) -> HostCheck {
    let finding = host.read("proc/self/limits").and_then(|table| {
        let line = table.lines().find_map(|line| line.strip_prefix("Max open files"));
        // Soft and hard; the agent raises the one to the other.
        let hard = line.and_then(|line| line.split_whitespace().nth(1));
        let hard = match hard {
            Some("unlimited") => u64::MAX,
            hard => hard
                .and_then(|hard| hard.parse().ok())
                .ok_or_else(|| Finding::unknown("/proc/self/limits says nothing of open files"))?,
        };
        let remedy = |wanted| format!("ulimit -Hn {wanted}, or LimitNOFILE={wanted} in the agent's unit");
        enough(host, "open files, for a process that is started like this one", hard, FILES_EACH, remedy)
    });
    check("limit-open-files", "Open files", BOTH, finding)
}

/// How many processes and threads there may be.
pub fn tasks(host: &Host) -> HostCheck {
    let finding = host.number("proc/sys/kernel/pid_max").and_then(|pids| {
        let threads = host.number("proc/sys/kernel/threads-max")?;
        let remedy = |wanted| format!("sysctl -w kernel.pid_max={wanted} kernel.threads-max={wanted}");
        enough(host, "processes and threads", pids.min(threads), TASKS_EACH, remedy)
    });
    check("limit-tasks", "Processes and threads", BOTH, finding)
}

/// How many pieces a process's memory may be in.
pub fn memory_maps(host: &Host) -> HostCheck {
    let finding = host.number("proc/sys/vm/max_map_count").map(|maps| {
        if maps < MEMORY_MAPS {
            let remedy = format!("sysctl -w vm.max_map_count={MEMORY_MAPS}");
            return Finding::warning(
                format!("{maps} mappings for a process: less than Linux's own setting"),
                remedy,
            );
        }
        Finding::ok(format!("{maps} mappings for a process"))
    });
    check("limit-memory-maps", "Memory mappings", BOTH, finding)
}

/// How many network namespaces there may be: each VM has one, whether it has a network or not.
pub fn network_namespaces(host: &Host) -> HostCheck {
    let finding = host.number("proc/sys/user/max_net_namespaces").and_then(|most| {
        if most == 0 {
            return Ok(Finding::problem("none may be made", "sysctl -w user.max_net_namespaces=65536"));
        }
        let remedy = |wanted| format!("sysctl -w user.max_net_namespaces={wanted}");
        // One that its VMM is in, and one that its network is in.
        enough(host, "network namespaces", most, 2, remedy)
    });
    check("limit-network-namespaces", "Network namespaces", BOTH, finding)
}

/// Compares a limit with what so many sandboxes need as the agent takes by itself.
fn enough(
    host: &Host,
    what: &str,
    limit: u64,
    each: u64,
    remedy: impl FnOnce(u64) -> String,
) -> Result<Finding, Finding> {
    let sandboxes = host.sandboxes()?;
    let wanted = sandboxes.saturating_mul(each).saturating_add(BESIDE);
    let limit_text = if limit == u64::MAX { "any number of".to_owned() } else { limit.to_string() };
    let found = format!("{limit_text} {what}; {sandboxes} sandboxes want {wanted}");
    Ok(if limit < wanted {
        Finding::warning(found, remedy(wanted.next_power_of_two()))
    } else {
        Finding::ok(found)
    })
}

/// Whether the user IDs that VMs run as are nobody else's.
pub fn users(host: &Host) -> HostCheck {
    let range = crate::driver::home::uids();
    let finding = host.read("etc/passwd").and_then(|passwd| {
        let name_and_uid = |line: &str| {
            let mut fields = line.split(':');
            let (name, uid) = (fields.next()?.to_owned(), fields.nth(1)?.parse::<u64>().ok()?);
            Some((name, uid, 1))
        };
        let delegated = |line: &str| {
            let mut fields = line.split(':');
            let (name, first) = (fields.next()?, fields.next()?.parse::<u64>().ok()?);
            Some((format!("{name} (subordinate)"), first, fields.next()?.parse::<u64>().ok()?))
        };
        let subordinate = match host.try_read("etc/subuid") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|error| Finding::unknown(format!("cannot read /etc/subuid: {error}")))?,
        };
        let all = passwd.lines().filter_map(name_and_uid).chain(subordinate.lines().filter_map(delegated));
        let (first, last) = (u64::from(*range.start()), u64::from(*range.end()));
        let overlaps = |from: u64, count: u64| from <= last && from.saturating_add(count) > first;
        let others: Vec<_> =
            all.filter(|&(_, from, count)| overlaps(from, count)).map(|(name, ..)| name).collect();
        let range = format!("{first} to {last}");
        Ok(if others.is_empty() {
            Finding::ok(format!("{range} are nobody else's by /etc/passwd and /etc/subuid"))
        } else {
            Finding::warning(
                format!("VMs run as users {range}, of which some are also {}", others.join(", ")),
                "give these users other IDs: a VM might be one of them",
            )
        })
    });
    check("users", "User IDs of VMs", BOTH, finding)
}

/// Whether what VMs make the kernel say is written to a slow line.
pub fn console(host: &Host) -> HostCheck {
    let finding = host.read("proc/sys/kernel/printk").and_then(|levels| {
        let level = levels.split_whitespace().next().and_then(|level| level.parse::<u64>().ok());
        let level =
            level.ok_or_else(|| Finding::unknown(format!("/proc/sys/kernel/printk says {levels:?}")))?;
        let command_line = host.read("proc/cmdline")?;
        let serial = ["console=ttyS", "console=ttyAMA", "console=hvc"];
        let is_slow =
            command_line.split_whitespace().any(|word| serial.iter().any(|it| word.starts_with(it)));
        Ok(match (is_slow, level > QUIET) {
            (true, true) => Finding::warning(
                format!(
                    "messages up to level {level} go to a serial line: each VM that is made waits for them"
                ),
                "boot with `quiet loglevel=1`",
            ),
            (true, false) => Finding::ok(format!("a serial line, with messages below level {level} alone")),
            (false, _) => Finding::ok(format!("level {level}, on no serial line")),
        })
    });
    check("kernel-console", "Messages of the kernel", BOTH, finding)
}

/// Where randomness comes from: new sandboxes are seeded by it. A fact.
pub fn randomness(host: &Host) -> HostCheck {
    let finding = host.read("proc/cpuinfo").map(|cpuinfo| {
        let instruction =
            if cpuinfo.contains(" rdrand") { "rdrand" } else { "no instruction of the processor" };
        let device = host.try_read("sys/class/misc/hw_random/rng_current").unwrap_or_default();
        let device = if device.is_empty() || device == "none" { "no device".to_owned() } else { device };
        Finding::ok(format!("the kernel's own pool, {instruction}, {device}"))
    });
    check("kernel-randomness", "Randomness", BOTH, finding)
}

/// Whether somebody sets the clock: guests get the time from it.
pub fn clock(host: &Host) -> HostCheck {
    let signs = [
        ("run/systemd/timesync/synchronized", "systemd-timesyncd has set it"),
        ("run/chrony/chronyd.pid", "chronyd runs"),
        ("run/chrony/chronyd.sock", "chronyd runs"),
        ("run/ntpd.pid", "ntpd runs"),
    ];
    let sign = signs.into_iter().find(|(path, _)| host.has(path));
    let finding = sign.map(|(_, says)| Finding::ok(says)).ok_or_else(|| {
        Finding::unknown("neither systemd-timesyncd nor chronyd nor ntpd shows that it sets the clock")
    });
    check("clock", "Clock", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    const RELEASE: &str = "proc/sys/kernel/osrelease";
    /// 16 GiB: 128 sandboxes.
    const MEMORY: (&str, &str) = ("proc/meminfo", "MemTotal: 16777216 kB\n");

    #[test]
    fn kernels_are_told_apart() {
        for (release, runs, is_tested) in [
            ("4.19.0", Problem, Warning),
            ("5.10.230", Fine, Fine),
            ("6.1.0-40-amd64", Fine, Fine),
            ("6.12.3", Fine, Warning),
            ("6.18.44", Fine, Warning),
        ] {
            let machine = Machine::with([(RELEASE, release)]);
            assert_eq!(version(&machine.host()).status(), runs, "{release}");
            assert_eq!(tested(&machine.host()).status(), is_tested, "{release}");
        }
        assert_eq!(version(&Machine::with([]).host()).status(), Unknown);
    }

    #[test]
    fn an_agent_is_root() {
        for (status, wanted) in
            [("Name: x\nUid:\t0\t0\t0\t0\n", Fine), ("Uid:\t0\t7\t0\t0\n", Problem), ("Name: x\n", Unknown)]
        {
            let machine = Machine::with([("proc/self/status", status)]);
            assert_eq!(privileges(&machine.host()).status(), wanted, "{status}");
        }
    }

    #[test]
    fn written_pages_and_page_faults() {
        assert_eq!((writes(true).status(), writes(false).status()), (Fine, Warning));
        let machine = Machine::with([(RELEASE, "6.1.0")]);
        assert_eq!(userfaultfd_device(&machine.host()).status(), Warning);
        machine.write("dev/userfaultfd", "");
        assert_eq!(userfaultfd_device(&machine.host()).status(), Fine);
        let old = Machine::with([(RELEASE, "5.10.0")]);
        assert_eq!(userfaultfd_device(&old.host()).status(), Fine);
    }

    #[test]
    fn limits_are_measured_by_how_many_sandboxes_fit() {
        let machine = Machine::with([MEMORY]);
        let host = machine.host();
        let limits = |hard: &str| {
            machine.write("proc/self/limits", &format!("Max open files            1024   {hard}   files\n"));
            open_files(&host)
        };
        // 128 of them want 32 each, and 4096 beside.
        assert_eq!(limits("8192").status(), Fine);
        assert_eq!(limits("unlimited").status(), Fine);
        assert_eq!(limits("8191").status(), Warning);
        assert!(limits("8191").remedy.contains("LimitNOFILE=8192"));
        machine.write("proc/sys/kernel/pid_max", "4194304\n");
        machine.write("proc/sys/kernel/threads-max", "6000\n");
        assert_eq!(tasks(&host).status(), Warning);
        machine.write("proc/sys/kernel/threads-max", "60000\n");
        assert_eq!(tasks(&host).status(), Fine);
        for (most, status) in [("0", Problem), ("100", Warning), ("60000", Fine)] {
            machine.write("proc/sys/user/max_net_namespaces", most);
            assert_eq!(network_namespaces(&host).status(), status);
        }
        for (maps, status) in [("65530", Fine), ("1000", Warning)] {
            machine.write("proc/sys/vm/max_map_count", maps);
            assert_eq!(memory_maps(&host).status(), status);
        }
    }

    #[test]
    fn nobody_else_is_who_a_vm_is() {
        let machine = Machine::with([("etc/passwd", "root:x:0:0::/:/bin/sh\nnobody:x:65534:1::/:\n")]);
        assert_eq!(users(&machine.host()).status(), Fine);
        machine.write("etc/subuid", "builder:1879000000:65536\n");
        assert_eq!(users(&machine.host()).status(), Warning);
        machine.write("etc/subuid", "builder:100000:65536\n");
        machine.write("etc/passwd", "late:x:2147483647:0::/:\n");
        let told = users(&machine.host());
        assert!(told.status() == Warning && told.found.ends_with("late"), "{told:?}");
        assert_eq!(users(&Machine::with([]).host()).status(), Unknown);
    }

    #[test]
    fn a_chatty_kernel_is_warned_of_on_a_serial_line() {
        for (level, command_line, status) in [
            ("7 4 1 7", "root=/dev/sda console=ttyS0,115200", Warning),
            ("4 4 1 7", "console=ttyS0 quiet", Fine),
            ("7 4 1 7", "console=tty0", Fine),
            ("", "console=tty0", Unknown),
        ] {
            let machine = Machine::with([("proc/sys/kernel/printk", level), ("proc/cmdline", command_line)]);
            assert_eq!(console(&machine.host()).status(), status, "{level} {command_line}");
        }
    }

    #[test]
    fn randomness_and_the_clock_are_facts() {
        let machine = Machine::with([("proc/cpuinfo", "flags : fpu rdrand\n")]);
        let told = randomness(&machine.host());
        assert_eq!(told.status(), Fine);
        assert!(told.found.contains("rdrand, no device"), "{}", told.found);
        assert_eq!(clock(&machine.host()).status(), Unknown);
        machine.write("run/chrony/chronyd.pid", "7");
        assert_eq!(clock(&machine.host()).status(), Fine);
    }
}
