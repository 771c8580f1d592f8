//! The host's memory: what of it ends up where it should not, and what is set aside.

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, Finding, check},
    host::Host,
};

/// All of them.
pub fn all(host: &Host) -> Vec<HostCheck> {
    vec![same_pages(host), swap(host), transparent_huge_pages(host), huge_pages(host)]
}

/// Whether the kernel merges equal pages of different sandboxes.
pub fn same_pages(host: &Host) -> HostCheck {
    let finding = if host.has("sys/kernel/mm/ksm") {
        host.number("sys/kernel/mm/ksm/run").map(|run| match run {
            1 => Finding::warning(
                "on: how long a write takes tells a sandbox what others have in memory",
                "echo 2 > /sys/kernel/mm/ksm/run, and disable ksmtuned if it is there",
            ),
            _ => Finding::ok("off"),
        })
    } else {
        Ok(Finding::ok("not in this kernel"))
    };
    check("memory-ksm", "Merging of equal pages (KSM)", BOTH, finding)
}

/// Whether guests' memory may be written to a disk.
pub fn swap(host: &Host) -> HostCheck {
    let finding = host.read("proc/swaps").map(|table| {
        let areas: Vec<&str> =
            table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
        if areas.is_empty() {
            return Finding::ok("none");
        }
        Finding::warning(
            format!("{}: what guests have in memory may stay on it", areas.join(", ")),
            "swapoff -a, and take it out of /etc/fstab",
        )
    });
    check("memory-swap", "Swap", BOTH, finding)
}

/// When the kernel makes huge pages by itself.
pub fn transparent_huge_pages(host: &Host) -> HostCheck {
    let finding = host.read("sys/kernel/mm/transparent_hugepage/enabled").map(|setting| {
        let chosen = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        Finding::ok(chosen.map_or(setting.as_str(), |(chosen, _)| chosen))
    });
    check("memory-thp", "Transparent huge pages", BOTH, finding)
}

/// Huge pages that are set aside. Nothing here uses them: a fact.
pub fn huge_pages(host: &Host) -> HostCheck {
    let finding = host.read("proc/meminfo").and_then(|table| {
        let field = |name: &str| {
            let line = table.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        match (field("HugePages_Total:"), field("Hugepagesize:")) {
            (Some(0), _) => Ok(Finding::ok("none are set aside")),
            (Some(pages), Some(kib)) => Ok(Finding::ok(format!(
                "{pages} of {kib} KiB are set aside: {} MiB that sandboxes use under Firecracker with --huge-pages alone",
                pages.saturating_mul(kib) / 1024
            ))),
            _ => Err(Finding::unknown("/proc/meminfo says nothing of huge pages")),
        }
    });
    check("memory-huge-pages", "Reserved huge pages", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    #[test]
    fn merged_pages_are_warned_of() {
        for (run, status) in [("0", Fine), ("1", Warning), ("2", Fine)] {
            let machine = Machine::with([("sys/kernel/mm/ksm/run", run)]);
            assert_eq!(same_pages(&machine.host()).status(), status);
        }
        assert_eq!(same_pages(&Machine::with([]).host()).status(), Fine);
        assert_eq!(same_pages(&Machine::with([("sys/kernel/mm/ksm/run", "?")]).host()).status(), Unknown);
    }

    #[test]
    fn swap_is_named() {
        const HEAD: &str = "Filename\tType\tSize\tUsed\tPriority\n";
        let machine = Machine::with([("proc/swaps", HEAD)]);
        assert_eq!(swap(&machine.host()).status(), Fine);
        machine.write("proc/swaps", &format!("{HEAD}/dev/sda2 partition 1 0 -2\n/swap.img file 1 0 -3\n"));
        let told = swap(&machine.host());
        assert_eq!(told.status(), Warning);
        assert!(told.found.starts_with("/dev/sda2, /swap.img:"), "{}", told.found);
    }

    #[test]
    fn huge_pages_are_facts() {
        let machine = Machine::with([
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("proc/meminfo", "HugePages_Total:      64\nHugepagesize:       2048 kB\n"),
        ]);
        assert_eq!(transparent_huge_pages(&machine.host()).found, "madvise");
        let told = huge_pages(&machine.host());
        assert_eq!(told.status(), Fine);
        assert!(told.found.contains("128 MiB"), "{}", told.found);
    }
}
