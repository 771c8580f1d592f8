//! What a Firecracker is told before it starts a guest: its machine.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::api::{
    ACT, ADD_BALLOON, ADD_BASE, ADD_ENTROPY, ADD_LAYER, ADD_NETWORK, ADD_VSOCK, Call, SET_BOOT_SOURCE,
    SET_MACHINE,
};
use crate::{driver::command_line, microvm::Kind};

/// In every jail.
pub const KERNEL: &str = "kernel";
/// Likewise.
pub const INITRAMFS: &str = "initramfs";
/// Likewise.
pub const BASE: &str = "base";
/// Likewise.
pub const LAYER: &str = "layer";
/// The address of every guest on its own vsock: the first that is not reserved (vsock(7)).
const GUEST_CID: u32 = 3;
/// The network's device.
pub const NETWORK: &str = "network";

/// What Firecracker calls memory of huge pages.
pub const HUGE_PAGES: &str = "2M";

/// What a host lets its VMs have, and how its CPU is shown to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The program.
    pub firecracker: PathBuf,
    /// Its jailer.
    pub jailer: PathBuf,
    /// One of Firecracker's own CPU templates, such as `T2CL`: what hosts with other CPUs can restore.
    pub cpu_template: Option<String>,
    /// What a VM may read and write on each of its disks, MiB a second.
    pub disk_mib: Option<u32>,
    /// Operations of a VM on each of its disks, a second.
    pub disk_iops: Option<u32>,
    /// Whether guests' memory is of huge pages.
    pub huge_pages: bool,
}

/// The calls that make a machine of `kind` and start it. Paths are those in its jail; `network` is the guest's MAC and the TAP's
/// name.
pub fn calls(settings: &Settings, kind: &Kind, network: Option<([u8; 6], &str)>) -> Vec<(Call, Value)> {
    let mut machine = json!({
        "vcpu_count": kind.cpu_count,
        "mem_size_mib": kind.memory_mb,
        "smt": false,
        // With that, the processor's tables would be of small pages all the same (docs/hugepages.md).
        "track_dirty_pages": !settings.huge_pages,
    });
    if settings.huge_pages {
        machine["huge_pages"] = json!(HUGE_PAGES);
    }
    if let Some(template) = &settings.cpu_template {
        machine["cpu_template"] = json!(template);
    }
    let boot = json!({
        "kernel_image_path": in_jail(KERNEL),
        "initrd_path": in_jail(INITRAMFS),
        "boot_args": boot_arguments(network.is_some()),
    });
    let mut calls = vec![
        (SET_MACHINE, machine),
        (SET_BOOT_SOURCE, boot),
        // In this order the guest finds vda and vdb.
        (ADD_BASE, drive(settings, BASE, true)),
        (ADD_LAYER, drive(settings, LAYER, false)),
    ];
    if let Some((mac, tap)) = network {
        // What it may send and receive is bounded in its namespace, whichever VMM it has.
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        calls.push((ADD_NETWORK, json!({ "iface_id": NETWORK, "host_dev_name": tap, "guest_mac": mac })));
    }
    calls.extend([
        (ADD_VSOCK, json!({ "guest_cid": GUEST_CID, "uds_path": in_jail(super::jail::GUEST) })),
        (ADD_ENTROPY, json!({})),
    ]);
    // Huge pages cannot be taken by it: Firecracker refuses to have both.
    if !settings.huge_pages {
        // It takes nothing unless it is told, and gives back what it has when the guest is short of memory.
        let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 0 });
        calls.push((ADD_BALLOON, balloon));
    }
    calls.push((ACT, json!({ "action_type": "InstanceStart" })));
    calls
}

/// What is called `name` in a jail, as the jailed see it.
pub fn in_jail(name: &str) -> String {
    Path::new("/").join(name).to_string_lossy().into_owned()
}

fn drive(settings: &Settings, id: &str, is_read_only: bool) -> Value {
    let mut drive = json!({
        "drive_id": id,
        "path_on_host": in_jail(id),
        "is_root_device": false,
        "is_read_only": is_read_only,
        // What the guest flushes is on the host's disk when it is told so.
        "cache_type": "Writeback",
    });
    // A bucket for a second's worth, filled anew within a second.
    let bucket = |size: u64| json!({ "size": size, "refill_time": 1000 });
    if let Some(mib) = settings.disk_mib {
        drive["rate_limiter"]["bandwidth"] = bucket(u64::from(mib) << 20);
    }
    if let Some(iops) = settings.disk_iops {
        drive["rate_limiter"]["ops"] = bucket(iops.into());
    }
    drive
}

/// The kernel's command line. Firecracker adds `root=` for a root device, of which there is none, and nothing else.
pub fn boot_arguments(has_network: bool) -> String {
    // A guest that panics, or reboots, resets by its keyboard controller, which ends Firecracker. There is no PCI, and no more of
    // the keyboard controller than that (docs/kernel-policy.md).
    let machine = "console=ttyS0 quiet panic=-1 reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd";
    format!("{machine} oc.link=vsock{}", command_line::of_guest(has_network))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::plan::{GUEST_MAC, TAP};

    fn kind() -> Kind {
        Kind { template: "base".into(), cpu_count: 2, memory_mb: 512 }
    }

    fn body(calls: &[(Call, Value)], wanted: Call) -> Value {
        calls.iter().find(|(call, _)| *call == wanted).unwrap().1.clone()
    }

    #[test]
    fn a_machine_is_what_its_kind_and_its_host_say() {
        let plain = calls(&Settings::default(), &kind(), None);
        assert!(plain.iter().all(|(call, _)| *call != ADD_NETWORK));
        assert_eq!(plain.last().unwrap().0, ACT);
        let machine = body(&plain, SET_MACHINE);
        assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(512)));
        assert_eq!((machine.get("huge_pages"), &machine["track_dirty_pages"]), (None, &json!(true)));
        assert_eq!((machine.get("cpu_template"), body(&plain, ADD_BASE).get("rate_limiter")), (None, None));
        assert_eq!(body(&plain, ADD_BASE)["is_read_only"], json!(true));
        assert_eq!(body(&plain, ADD_LAYER)["path_on_host"], json!("/layer"));
        assert!(!body(&plain, SET_BOOT_SOURCE)["boot_args"].as_str().unwrap().contains("oc.net"));

        let settings = Settings {
            cpu_template: Some("T2CL".into()),
            disk_mib: Some(3),
            disk_iops: Some(70),
            huge_pages: true,
            ..Settings::default()
        };
        let full = calls(&settings, &kind(), Some((GUEST_MAC, TAP)));
        let machine = body(&full, SET_MACHINE);
        assert_eq!((&machine["cpu_template"], &machine["huge_pages"]), (&json!("T2CL"), &json!("2M")));
        assert_eq!(machine["track_dirty_pages"], json!(false));
        let has_balloon = |calls: &[(Call, Value)]| calls.iter().any(|(call, _)| *call == ADD_BALLOON);
        assert!(has_balloon(&plain) && !has_balloon(&full));
        let limiter = &body(&full, ADD_LAYER)["rate_limiter"];
        assert_eq!(limiter["bandwidth"], json!({ "size": 3 << 20, "refill_time": 1000 }));
        assert_eq!(limiter["ops"], json!({ "size": 70, "refill_time": 1000 }));
        let network = body(&full, ADD_NETWORK);
        assert_eq!(network["guest_mac"], json!("02:6f:63:00:00:02"));
        assert_eq!(network["host_dev_name"], json!(TAP));
        assert!(body(&full, SET_BOOT_SOURCE)["boot_args"].as_str().unwrap().contains(" oc.net="));
    }
}
