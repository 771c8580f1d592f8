//! KVM: the device, whether a guest gets on under it, and how its module is set.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use oc_proto::v1::HostCheck;

use super::{
    finding::{BOTH, FIRECRACKER, Finding, QEMU, check},
    host::Host,
};
use crate::driver::{
    accelerator::{self, extension},
    qemu, template,
};

mod calls {
    #![allow(missing_docs, reason = "KVM_GET_API_VERSION, as the macro writes it")]

    nix::ioctl_write_int_bad!(api_version, nix::request_code_none!(0xae, 0x00));
}

/// The only version there will be (Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;
/// Since when moving a process between control groups may wait for the whole machine (6a010a49b63a in Linux).
const SLOW_MOVES_SINCE: (u32, u32) = (6, 0);
/// Since when KVM moves none when it makes a VM: its helper is a task of the VM's own process (d96c77bd4eeb in Linux).
const NO_MOVES_SINCE: (u32, u32) = (6, 13);

/// What came of a kernel that was booted under KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// It got on.
    Boots,
    /// It did not.
    Fails(String),
    /// There was nothing to try it with.
    Untried(String),
}

/// All of them; `trial` is what came of a kernel.
pub fn all(host: &Host, trial: &Trial) -> Vec<HostCheck> {
    vec![device(host), guest(trial), accelerator(trial), creation(host), timer_period(host)]
}

/// Boots a template's kernel under KVM, with QEMU.
pub async fn try_kernel(host: &Host, image_dir: &Path) -> Trial {
    if !host.has("dev/kvm") {
        return Trial::Fails("there is no /dev/kvm".to_owned());
    }
    if host.read("proc/cpuinfo").is_ok_and(|cpuinfo| extension(&cpuinfo).is_none()) {
        return Trial::Fails("the processor shows neither vmx nor svm".to_owned());
    }
    if host.program(Path::new(qemu::PROGRAM)).is_none() {
        return Trial::Untried(format!("it takes {} to try it", qemu::PROGRAM));
    }
    let Some(kernel) = kernel(host, image_dir) else {
        return Trial::Untried(format!(
            "it takes the kernel of a template in {} to try it",
            image_dir.display()
        ));
    };
    accelerator::probe(Some(&kernel)).await.map_or_else(Trial::Fails, |()| Trial::Boots)
}

fn kernel(host: &Host, image_dir: &Path) -> Option<PathBuf> {
    let templates = template::find(&host.path(image_dir)).ok()?;
    templates.first().map(template::Template::kernel)
}

/// Whether there is KVM, and this process may use it.
pub fn device(host: &Host) -> HostCheck {
    let opened = File::options().read(true).write(true).open(host.path("dev/kvm"));
    let finding = match opened {
        Ok(device) => judge(api_version(&device)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::problem(
            "there is no /dev/kvm",
            "modprobe kvm_intel, or kvm_amd; switch VT-x or AMD-V on in the firmware",
        ),
        Err(error) => Finding::problem(
            format!("/dev/kvm cannot be opened: {error}"),
            "run the agent as root, which a container or a policy must permit",
        ),
    };
    check("kvm-device", "/dev/kvm", FIRECRACKER, Ok(finding))
}

fn api_version(device: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open, and the call takes nothing but a zero, which KVM insists on.
    Ok(unsafe { calls::api_version(device.as_raw_fd(), 0) }?)
}

fn judge(version: io::Result<i32>) -> Finding {
    match version {
        Ok(API_VERSION) => Finding::ok(format!("can be used, API version {API_VERSION}")),
        Ok(other) => Finding::problem(
            format!("/dev/kvm speaks API version {other}, not {API_VERSION}"),
            "use a kernel that has KVM of its own",
        ),
        Err(error) => Finding::problem(
            format!("/dev/kvm does not say its version: {error}"),
            "make it anew: mknod /dev/kvm c 10 232",
        ),
    }
}

/// Whether guests get on under KVM: the device is there on machines, too, that only seem to have it.
pub fn guest(trial: &Trial) -> HostCheck {
    let finding = match trial {
        Trial::Boots => Ok(Finding::ok("a kernel booted")),
        Trial::Fails(reason) => Ok(Finding::problem(
            reason,
            "use a machine of metal, or one with nested virtualisation; QEMU runs sandboxes here without it",
        )),
        Trial::Untried(reason) => Err(Finding::unknown(reason)),
    };
    check("kvm-guest", "A guest under KVM", FIRECRACKER, finding)
}

/// What QEMU is going to run guests' instructions by.
pub fn accelerator(trial: &Trial) -> HostCheck {
    let finding = match trial {
        Trial::Boots => Ok(Finding::ok("kvm")),
        Trial::Fails(reason) => Ok(Finding::warning(
            format!("tcg: guests are emulated, which is slow and no isolation by hardware: {reason}"),
            "use a machine with hardware virtualisation for code that nobody trusts",
        )),
        Trial::Untried(reason) => Err(Finding::unknown(reason)),
    };
    check("qemu-accelerator", "Accelerator of QEMU", QEMU, finding)
}

/// Whether making a VM waits for all of the machine.
pub fn creation(host: &Host) -> HostCheck {
    let finding = host.kernel().and_then(|version| {
        if !(SLOW_MOVES_SINCE..NO_MOVES_SINCE).contains(&version) {
            return Ok(Finding::ok("quick with this kernel"));
        }
        if host.try_read("sys/module/kvm/parameters/nx_huge_pages").is_ok_and(|setting| setting == "never") {
            return Ok(Finding::ok("kvm.nx_huge_pages=never"));
        }
        let mounts = host.read("proc/self/mounts")?;
        if mounts.lines().any(|mount| mount.contains(" cgroup") && mount.contains("favordynmods")) {
            return Ok(Finding::ok("control groups are mounted with favordynmods"));
        }
        let fault = host.read("sys/devices/system/cpu/vulnerabilities/itlb_multihit")?;
        let remedy = if fault == "Not affected" {
            "echo 'options kvm nx_huge_pages=never' > /etc/modprobe.d/kvm.conf, and load kvm anew"
        } else {
            "mount -o remount,favordynmods /sys/fs/cgroup; with version 1, boot with cgroup_favordynmods=true"
        };
        Ok(Finding::warning(
            "a VM waits some 10 ms and more to be made, for a lock of the whole machine",
            remedy,
        ))
    });
    check("kvm-creation", "Making a VM (nx_huge_pages, favordynmods)", BOTH, finding)
}

/// How often a guest's timer may go off: a guest that asks for many keeps its host busy. A fact: which value is good depends
/// on what runs.
pub fn timer_period(host: &Host) -> HostCheck {
    let finding = host.number("sys/module/kvm/parameters/min_timer_period_us").map(|period| {
        Finding::ok(format!(
            "{period} µs between two interrupts of a guest's timer, at least (kvm.min_timer_period_us)"
        ))
    });
    check("kvm-timer-period", "Timer of guests", BOTH, finding)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    #[test]
    fn only_the_device_itself_will_do() {
        let machine = Machine::with([]);
        assert_eq!(device(&machine.host()).status(), Problem);
        machine.write("dev/kvm", "a file");
        let told = device(&machine.host());
        assert_eq!(told.status(), Problem);
        assert!(told.found.contains("does not say its version"), "{}", told.found);
        let status = |version| check("x", "X", BOTH, Ok(judge(Ok(version)))).status();
        assert_eq!((status(12), status(11)), (Fine, Problem));
    }

    #[tokio::test]
    async fn a_kernel_that_hangs_is_a_problem_for_firecracker_alone() {
        let fails = Trial::Fails("hangs".to_owned());
        assert_eq!((guest(&fails).status(), accelerator(&fails).status()), (Problem, Warning));
        assert_eq!((guest(&Trial::Boots).status(), accelerator(&Trial::Boots).status()), (Fine, Fine));
        let machine = Machine::with([("proc/cpuinfo", "flags : fpu\n")]);
        let without = try_kernel(&machine.host(), Path::new("/images")).await;
        assert!(matches!(&without, Trial::Fails(why) if why.contains("/dev/kvm")), "{without:?}");
        machine.write("dev/kvm", "");
        let without = try_kernel(&machine.host(), Path::new("/images")).await;
        assert!(matches!(&without, Trial::Fails(why) if why.contains("svm")), "{without:?}");
        machine.write("proc/cpuinfo", "flags : fpu svm\n");
        let untried = try_kernel(&machine.host(), Path::new("/images")).await;
        assert!(matches!(&untried, Trial::Untried(why) if why.contains("qemu")), "{untried:?}");
        machine.program(qemu::PROGRAM, "exit 1");
        let untried = try_kernel(&machine.host(), Path::new("/images")).await;
        assert!(matches!(&untried, Trial::Untried(why) if why.contains("/images")), "{untried:?}");
        assert_eq!((guest(&untried).status(), accelerator(&untried).status()), (Unknown, Unknown));
    }

    #[test]
    fn slow_creation_is_warned_of_where_the_kernel_has_it() {
        const PARAMETER: &str = "sys/module/kvm/parameters/nx_huge_pages";
        let machine = Machine::with([
            ("proc/sys/kernel/osrelease", "6.1.12"),
            ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"),
            ("sys/devices/system/cpu/vulnerabilities/itlb_multihit", "KVM: Mitigation: Split huge pages\n"),
            (PARAMETER, "Y\n"),
        ]);
        let told = creation(&machine.host());
        assert_eq!(told.status(), Warning);
        assert!(told.remedy.contains("favordynmods"), "{}", told.remedy);
        machine.write("sys/devices/system/cpu/vulnerabilities/itlb_multihit", "Not affected\n");
        assert!(creation(&machine.host()).remedy.contains("nx_huge_pages=never"));
        machine.write(PARAMETER, "never\n");
        assert_eq!(creation(&machine.host()).status(), Fine);
        machine.write(PARAMETER, "N\n");
        machine.write("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw,favordynmods 0 0\n");
        assert_eq!(creation(&machine.host()).status(), Fine);
        for kernel in ["5.10.1", "6.18.0"] {
            let machine = Machine::with([("proc/sys/kernel/osrelease", kernel)]);
            assert_eq!(creation(&machine.host()).status(), Fine);
        }
    }

    #[test]
    fn the_timers_period_is_a_fact() {
        let machine = Machine::with([("sys/module/kvm/parameters/min_timer_period_us", "200\n")]);
        let told = timer_period(&machine.host());
        assert_eq!(told.status(), Fine);
        assert!(told.found.starts_with("200 µs"), "{}", told.found);
        assert_eq!(timer_period(&Machine::with([]).host()).status(), Unknown);
    }
}
